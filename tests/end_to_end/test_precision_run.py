"""A run with `precision`: members in other precisions are in the bundle, verified, gated, timed where they run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
from digits import SETTINGS
from onnx import numpy_helper

from deploy_prune.cli.main import run_command
from deploy_prune.errors import ArtifactError, ParityError
from deploy_prune.files import sha256_file
from deploy_prune.release.bundle import finish
from deploy_prune.release.manifest import Manifest
from deploy_prune.release.verify import verify

QUICK = {
    **SETTINGS,
    "precision.examples": "32",
    "precision.agreement": "{bf16: 0.5, int8-static: 0.5}",  # an untrained model is never sure
    "bench.seconds": "0.01",
    "bench.batch": "[1]",
}


def command(out: Path, changes: dict[str, str]) -> list[str]:
    settings = [part for key, value in {**QUICK, **changes}.items() for part in ("--set", f"{key}={value}")]
    return ["-q", "run", "digits", *settings, "--out", str(out)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("precision") / "out"
    assert run_command(command(out, {"precision.also": "[bf16, int8-static]"})) == 0
    return out


def test_every_model_is_there_in_every_precision_and_timed_where_a_runtime_computes_in_it(bundle: Path) -> None:
    manifest = Manifest.load(bundle / "manifest.json")
    assert [member.name for member in manifest.members] == [
        *("dense", "s50", "dense.bf16", "s50.bf16", "dense.int8-static", "s50.int8-static")
    ]
    for member in manifest.members[2:]:
        twin, _, precision = member.name.partition(".")
        assert (member.twin, member.precision) == (twin, precision)
        assert member.quality is not None and member.parity["agreement"] >= member.parity["floor"]
        assert bool(member.latency) == (precision == "int8-static")
        assert member.audit is None or member.audit["passed"]


def test_verify_asks_every_precision_and_says_what_was_emulated(bundle: Path) -> None:
    asked = {check.name: check.runtime for check in verify(bundle).members}
    assert len(asked) == 6
    assert asked["s50.bf16"] == "onnxruntime, bf16 emulated" and asked["s50.int8-static"] == "onnxruntime"


@pytest.mark.parametrize("name", ["s50.bf16", "s50.int8-static"])
def test_verify_catches_a_wrong_weight_in_a_wholly_rehashed_bundle(name: str, bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    file = copy / f"models/{name}.onnx"
    proto = onnx.load(file)
    stored = next(
        i for i in proto.graph.initializer if "fc2.weight" in i.name and not i.name.endswith(("_scale", "_zero_point"))
    )
    values = numpy_helper.to_array(stored).copy()
    values[0], values[1] = values[1].copy(), values[0].copy()
    stored.CopyFrom(numpy_helper.from_array(values, stored.name))
    onnx.save(proto, file)
    manifest = Manifest.load(copy / "manifest.json")
    new = {"sha256": sha256_file(file), "bytes": file.stat().st_size}
    members = [m.model_copy(update=new) if m.name == name else m for m in manifest.members]
    finish(copy, manifest.model_copy(update={"members": members, "files": {}}))
    with pytest.raises((ArtifactError, ParityError), match="is off the fp32 weight"):
        verify(copy)


def test_rules_name_members_in_a_precision(bundle: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules:\n  - {members: ['*.int8-*'], max_bytes: 60%, max_drop: 0.5, audit: true}\n")
    assert run_command(["-q", "gate", str(bundle), "--rules", str(rules)]) == 0
    rules.write_text("rules:\n  - {members: ['*.bf16'], max_p50_ms: 1000}\n")  # nobody timed it here
    assert run_command(["-q", "gate", str(bundle), "--rules", str(rules)]) == 1


def test_predictions_that_agree_too_little_stop_the_run(tmp_path: Path) -> None:
    strict = {"precision.also": "[bf16]", "precision.tolerance": "{bf16: 1e-9}", "bench.enabled": "false"}
    assert run_command(command(tmp_path / "out", strict)) == 1
    assert not (tmp_path / "out").exists()


def test_a_node_to_keep_that_no_model_has_is_refused_before_anything_is_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converters.precision.convert_precision", lambda *a, **k: pytest.fail("converted"))
    asked = {"precision.also": "[bf16]", "precision.keep": "['*', gone*, away]", "bench.enabled": "false"}
    assert run_command(command(tmp_path / "out", asked)) == 2
    assert "no node is called 'gone*', 'away'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_runtime_is_not_timed_in_a_precision_that_it_does_not_compute_in(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ("--seconds", "0.001", "--threads", "1")
    assert run_command(["bench", str(bundle), "--json", *quick]) == 0
    out, err = capsys.readouterr()
    (cell,) = json.loads(out)["cells"]
    timed = [latency["name"] for latency in cell["latencies"]]
    assert timed == ["dense", "dense (again)", "s50", "dense.int8-static", "s50.int8-static"]
    assert json.loads(out)["left_out"] == {"ort-cpu": {"dense.bf16": "bf16", "s50.bf16": "bf16"}}
    assert "ort-cpu does not compute in bf16: dense.bf16, s50.bf16 left out" in err
    loose = [str(bundle / f"models/{name}.onnx") for name in ("s50.bf16", "s50")]
    assert run_command(["bench", *loose, *quick]) == 2
    out, err = capsys.readouterr()
    assert "the baseline is in a precision that the runtime does not compute in" in err and out == ""
    assert run_command(["-q", "bench", *reversed(loose), *quick]) == 0
    assert "s50.bf16 left out" in capsys.readouterr().out
