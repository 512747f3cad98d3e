"""The demo model learns its digits in seconds, the same way every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deploy_prune.architecture import Architecture, weights_sha256
from deploy_prune.demo import digits_vit, digits_vit_trained
from deploy_prune.sources import load_model
from deploy_prune.tasks import load_task

pytest.importorskip("sklearn")
REF = "python:deploy_prune.demo:digits_vit"


def test_demo_model_reads_digits_and_its_shell_needs_no_training() -> None:
    model = load_model(REF)
    task = load_task(
        "image-classification", model=model, model_ref=REF, calibration="digits:train", evaluation="digits:test"
    )
    quality = task.evaluate(lambda inputs: task.signature.call(model, inputs))
    assert quality.value >= 0.96
    assert task.signature.inputs[0].shape == ("batch", 1, 8, 8)
    batch = next(task.calibration(1352))
    assert abs(float(batch.inputs["pixel_values"].mean())) < 0.01
    assert float(batch.inputs["pixel_values"].std()) == pytest.approx(1, abs=0.01)
    shell = Architecture.of(model).build()
    assert weights_sha256(shell) != weights_sha256(model)
    shell.load_state_dict(model.state_dict())
    assert weights_sha256(shell) == weights_sha256(model)


def test_training_is_repeatable_and_leaves_the_callers_random_state() -> None:
    torch.manual_seed(5)
    threads, before = torch.get_num_threads(), torch.get_rng_state()
    first = digits_vit_trained(seed=3, epochs=1)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    torch.manual_seed(6)
    assert weights_sha256(digits_vit_trained(seed=3, epochs=1)) == weights_sha256(first)
    assert weights_sha256(digits_vit_trained(seed=4, epochs=1)) != weights_sha256(first)


def test_it_is_trained_once_and_again_when_the_cache_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = torch.get_rng_state()
    trained = digits_vit(seed=3, epochs=1)
    (file,) = (tmp_path / "cache" / "deploy-prune" / "digits").iterdir()
    monkeypatch.setattr("deploy_prune.demo.digits_vit_trained", None)
    kept = digits_vit(seed=3, epochs=1)
    assert weights_sha256(kept) == weights_sha256(trained)
    assert kept.training == trained.training and torch.equal(torch.get_rng_state(), before)
    assert all(p.requires_grad for p in kept.parameters())
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000] + bytes([whole[-1000] ^ 64]) + whole[-999:])  # one weight is another
    assert weights_sha256(digits_vit(seed=3, epochs=1)) == weights_sha256(trained)
    assert "damaged" in caplog.text and file.read_bytes() == whole
    caplog.clear()
    file.write_bytes(whole[:1000])
    assert weights_sha256(digits_vit(seed=3, epochs=1)) == weights_sha256(trained)
    assert "damaged" in caplog.text


def test_a_cache_that_cannot_be_written_is_said_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "x" * 300):  # a name so long that no file system looks for it
        caplog.clear()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
        assert not digits_vit(seed=3, epochs=1).training
        assert "cannot be kept" in caplog.text


def test_what_is_no_file_in_the_place_of_the_kept_model_is_left_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    digits_vit(seed=3, epochs=1)
    (file,) = (tmp_path / "deploy-prune" / "digits").iterdir()
    file.unlink()
    (file / "other").mkdir(parents=True)
    assert not digits_vit(seed=3, epochs=1).training
    assert "cannot be kept" in caplog.text and (file / "other").is_dir()
