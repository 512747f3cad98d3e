"""`deploy-prune sign`: put a name to a bundle."""

from __future__ import annotations

import os
from pathlib import Path

import click


@click.command(short_help="Sign a bundle with a key or a sigstore identity.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), help="Private key: PEM, elliptic curve P-256, P-384 or P-521.")
@click.option("--sigstore", is_flag=True, help="Sign as the OIDC identity of this CI job; needs the network.")
def command(bundle: Path, key: Path | None, sigstore: bool) -> None:
    """Check BUNDLE as `verify` does, then sign every file of it (OpenSSF model signing): BUNDLE/model.sig.

    The password of a key, if it has one, is read from DEPLOY_PRUNE_KEY_PASSWORD; a sigstore token, where CI has none,
    from SIGSTORE_ID_TOKEN.
    """
    from deploy_prune.cli import console
    from deploy_prune.release.signing import sign, sign_with_identity
    from deploy_prune.release.verify import verify

    if (key is None) == (not sigstore):
        raise click.UsageError("Give either --key FILE or --sigstore.")
    verify(bundle, progress=console.progress())
    if key is not None:
        file = sign(bundle, key, password=os.environ.get("DEPLOY_PRUNE_KEY_PASSWORD"))
    else:
        file = sign_with_identity(bundle, identity_token=os.environ.get("SIGSTORE_ID_TOKEN"))
    console.note(f"wrote {file}; `deploy-prune verify {bundle} --key PUBLIC_KEY` checks it")
