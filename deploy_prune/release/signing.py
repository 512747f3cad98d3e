"""Signatures: who made a bundle. OpenSSF model signing over every file of it, with a key, or a sigstore identity.

The signature lies in the bundle as `model.sig`, the one file that its manifest cannot list; the tool `model_signing`
checks it too. Keys are elliptic-curve PEM files and need no network; sigstore asks its services when signing, and for
its trust root when checking.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import ArtifactError, UnavailableError, UsageError
from deploy_prune.files import atomic_file, existing, existing_file
from deploy_prune.release.bundle import SIGNATURE

if TYPE_CHECKING:
    from collections.abc import Callable

_SIZE_LIMIT = 64 * 2**20  # it lists every file with its hash
_REMEDY = "Do not ship this bundle: get it again from whom you trust, or pass the key it was signed with."


def sign(bundle: Path | str, key: Path | str, *, password: str | None = None) -> Path:
    """Sign every file of a bundle with a private key; an older signature is replaced. Returns the signature's file.

    Raises UsageError for a file that is no private key on P-256, P-384 or P-521, or a wrong password.
    """
    bundle, key = existing(bundle, "bundle"), existing_file(key, "private key")

    def prepare(config: Any) -> Any:
        try:
            return config.use_elliptic_key_signer(private_key=key, password=password.encode() if password else None)
        except (ValueError, TypeError) as error:
            raise UsageError(
                "not a usable private key",
                where=str(key),
                expected="PEM, elliptic curve P-256, P-384 or P-521",
                got=str(error)[:200],
                remedy="openssl ecparam -name prime256v1 -genkey -noout -out key.pem; "
                "a key with a password takes it from DEPLOY_PRUNE_KEY_PASSWORD.",
            ) from error

    return _sign(bundle, prepare)


def sign_with_identity(bundle: Path | str, *, identity_token: str | None = None) -> Path:
    """Sign with a sigstore identity: a given OIDC token, the one of the CI job that this runs in, or a log-in in the
    browser. Needs the network. Raises UnavailableError when sigstore cannot be reached or refuses."""
    bundle = existing(bundle, "bundle")
    return _sign(
        bundle,
        lambda config: config.use_sigstore_signer(
            use_ambient_credentials=identity_token is None, identity_token=identity_token
        ),
    )


def check_signature(bundle: Path | str, key: Path | str) -> None:
    """Raise ArtifactError unless the bundle, whole and unchanged, was signed with the private half of the key."""
    key = existing_file(key, "public key")

    def prepare(config: Any) -> Any:
        try:
            return config.use_elliptic_key_verifier(public_key=key)
        except (ValueError, TypeError) as error:
            raise UsageError(
                "not a usable public key",
                where=str(key),
                expected="PEM, elliptic curve P-256, P-384 or P-521",
                got=str(error)[:200],
                remedy="openssl ec -in key.pem -pubout -out key.pub",
            ) from error

    _check(bundle, prepare, expected=f"a signature by {key}")


def check_identity(bundle: Path | str, *, identity: str, issuer: str) -> None:
    """Raise ArtifactError unless the bundle was signed by this sigstore identity (an address or workflow) of this OIDC
    issuer. Needs sigstore's trust root: the network, or what an earlier check left in its cache."""
    _check(
        bundle,
        lambda config: config.use_sigstore_verifier(identity=identity, oidc_issuer=issuer),
        expected=f"a signature by {identity} of {issuer}",
    )


def _sign(bundle: Path, prepare: Callable[[Any], Any]) -> Path:
    library = _library()
    hashing = library.hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    config = prepare(library.signing.Config().set_hashing_config(hashing))
    target = bundle / SIGNATURE
    with atomic_file(target) as temporary:
        hashing.add_ignored_paths(model_path=bundle, paths=[temporary.name])  # as seen from the bundle
        try:
            config.sign(bundle, temporary)
        except Exception as error:  # what sigstore's services answer has no common class
            raise UnavailableError(
                "cannot sign",
                where=str(bundle),
                got=str(error)[:400],
                remedy="Sigstore needs the network; --key does not.",
            ) from error
    return target


def _check(bundle: Path | str, prepare: Callable[[Any], Any], *, expected: str) -> None:
    bundle = existing(bundle, "bundle")
    file = bundle / SIGNATURE
    if file.is_symlink() or not file.is_file():
        raise ArtifactError(
            "the bundle is not signed", where=str(bundle), expected=expected, got=f"no {SIGNATURE}", remedy=_REMEDY
        )
    if file.stat().st_size > _SIZE_LIMIT:
        raise ArtifactError("too large for a signature", where=str(file), expected=expected, remedy=_REMEDY)
    library = _library()
    hashing = library.hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    config = prepare(library.verifying.Config().set_hashing_config(hashing))
    try:
        config.verify(bundle, file)
    except Exception as error:  # a forged file may break the library anywhere; only a check that ends well counts
        raise ArtifactError(
            "the signature is not good",
            where=str(bundle),
            expected=expected,
            got=str(error).strip()[:400] or type(error).__name__,
            remedy=_REMEDY,
        ) from error


def _library() -> Any:
    try:
        import model_signing.hashing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise UnavailableError("model-signing is not installed", remedy="pip install 'deploy-prune[sign]'") from error
    return model_signing
