"""Signatures: whoever lacks the key cannot change a byte of a signed bundle unnoticed."""

from __future__ import annotations

import base64
import json
import random

import pytest
from figures import changed
from shipped import bundle_of

from deploy_prune.cli.main import run_command
from deploy_prune.errors import ArtifactError, UnavailableError, UsageError
from deploy_prune.release.bundle import walk
from deploy_prune.release.signing import check_signature, sign
from deploy_prune.release.verify import verify

pytest.importorskip("model_signing", reason="model-signing is not installed")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Private and public key of the signer, and the public key of somebody else."""
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("keys")
    for name in ("own", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
        locked = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.BestAvailableEncryption(b"secret"))
        public = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pem").write_bytes(private)
        (folder / f"{name}.locked.pem").write_bytes(locked)
        (folder / f"{name}.pub").write_bytes(public)
    return folder


@pytest.fixture
def bundle(tiny_vit, tmp_path):
    return bundle_of(tiny_vit, tmp_path)


def test_signed_bundle_verifies_with_the_public_key_and_gate_asks_for_it(bundle, keys, capsys):
    assert run_command(["sign", str(bundle), "--key", str(keys / "own.pem")]) == 0
    assert run_command(["verify", str(bundle), "--key", str(keys / "own.pub")]) == 0
    assert "signature good" in capsys.readouterr().err
    assert run_command(["gate", str(bundle), "--key", str(keys / "own.pub")]) == 0
    assert run_command(["gate", str(bundle), "--key", str(keys / "other.pub")]) == 4
    assert run_command(["verify", str(bundle), "--key", str(keys / "other.pub")]) == 4


def test_a_bundle_is_signed_and_verified_by_a_relative_name_too(bundle, keys, monkeypatch):
    monkeypatch.chdir(bundle.parent)
    assert run_command(["sign", bundle.name, "--key", str(keys / "own.pem")]) == 0
    assert run_command(["verify", bundle.name, "--key", str(keys / "own.pub")]) == 0


def test_verify_says_of_a_signature_that_nobody_asked_about_that_it_was_not_checked(bundle, keys):
    assert verify(bundle).signature == "none"
    sign(bundle, keys / "own.pem")
    assert verify(bundle).signature == "not checked"
    assert verify(bundle, key=keys / "own.pub").signature == "good"


def test_bundle_without_a_signature_is_not_good(bundle, keys):
    with pytest.raises(ArtifactError, match="not signed") as caught:
        check_signature(bundle, keys / "own.pub")
    assert caught.value.exit_code == 4


def test_any_change_after_signing_is_caught_even_with_a_manifest_that_agrees(bundle, keys):
    sign(bundle, keys / "own.pem")
    check_signature(bundle, keys / "own.pub")
    card = bundle / "README.md"
    card.write_text(card.read_text() + "ours now\n")
    changed(bundle)  # hashes anew
    verify(bundle)  # the digest finds accidents only
    with pytest.raises(ArtifactError, match="signature is not good"):
        check_signature(bundle, keys / "own.pub")


def test_file_that_was_added_or_taken_away_is_caught(bundle, keys):
    sign(bundle, keys / "own.pem")
    (bundle / ".gitignore").write_text("x")  # a name that the library leaves out by default
    with pytest.raises(ArtifactError, match="signature is not good"):
        check_signature(bundle, keys / "own.pub")
    (bundle / ".gitignore").unlink()
    (bundle / "README.md").unlink()
    with pytest.raises(ArtifactError, match="signature is not good"):
        check_signature(bundle, keys / "own.pub")


def payload(signature):
    """The statement a signature file makes: every file with its hash."""
    return base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"])


def test_damaged_signature_is_caught_unless_it_still_says_the_same(bundle, keys):
    file = sign(bundle, keys / "own.pem")
    whole, chance, caught = file.read_bytes(), random.Random(0), 0
    for _ in range(40):
        damaged = bytearray(whole)
        place = chance.randrange(len(damaged))
        damaged[place : place + chance.randrange(4)] = bytes(chance.randrange(256) for _ in range(chance.randrange(4)))
        if bytes(damaged) == whole:
            continue
        file.write_bytes(damaged)
        try:
            check_signature(bundle, keys / "own.pub")
        except ArtifactError:
            caught += 1
        else:  # a space between two fields
            assert payload(damaged) == payload(whole)
    assert caught > 30
    for content in (b"", b"{}", b"null", b"[" * 100_000):
        file.write_bytes(content)
        with pytest.raises(ArtifactError):
            check_signature(bundle, keys / "own.pub")


def test_damaged_bundle_is_not_signed(bundle, keys):
    (bundle / "README.md").write_text("x")
    assert run_command(["sign", str(bundle), "--key", str(keys / "own.pem")]) == 4
    assert not (bundle / "model.sig").exists()


def test_signing_again_replaces_the_signature(bundle, keys):
    sign(bundle, keys / "own.pem")
    sign(bundle, keys / "other.pem")
    check_signature(bundle, keys / "other.pub")
    assert [name for name, _ in walk(bundle) if "partial" in name] == []


def test_key_with_a_password_takes_it_from_the_environment(bundle, keys, monkeypatch):
    arguments = ["sign", str(bundle), "--key", str(keys / "own.locked.pem")]
    assert run_command(arguments) == 2
    monkeypatch.setenv("DEPLOY_PRUNE_KEY_PASSWORD", "wrong")
    assert run_command(arguments) == 2
    monkeypatch.setenv("DEPLOY_PRUNE_KEY_PASSWORD", "secret")
    assert run_command(arguments) == 0
    check_signature(bundle, keys / "own.pub")


def test_what_is_no_key_is_said_to_be_none(bundle, keys, tmp_path):
    (tmp_path / "text").write_text("no key")
    with pytest.raises(UsageError, match="not a usable private key"):
        sign(bundle, tmp_path / "text")
    sign(bundle, keys / "own.pem")
    with pytest.raises(UsageError, match="not a usable public key"):
        check_signature(bundle, tmp_path / "text")
    with pytest.raises(UnavailableError, match="no such public key"):
        check_signature(bundle, tmp_path / "nothing")
