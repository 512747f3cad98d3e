"""`deploy-prune bench`: pure results on stdout, the dense model first, and requests refused before any timing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from onnx_models import save_embedder, save_mlp

from bench.report import summarise
from bench.samples import Samples
from deploy_prune.cli.bench import counts
from deploy_prune.cli.main import run_command
from deploy_prune.cli.timed_models import find_models
from deploy_prune.errors import ArtifactError, UnavailableError, UsageError

QUICK = ("--seconds", "0.001", "--threads", "1")


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.timing.MIN_ROUNDS", 4)
    monkeypatch.setattr("bench.timing.MAX_CALLS", 2)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    for name, hidden in (("a30", 4), ("dense", 8), ("b50", 6)):
        save_mlp(tmp_path / "bundle" / "models" / f"{name}.onnx", hidden)
    return tmp_path / "bundle"


def manifest(bundle: Path, **files: str) -> None:
    members = [{"name": name, "file": file} for name, file in files.items()]
    (bundle / "manifest.json").write_text(json.dumps({"members": members}))


def test_json_is_all_there_is_on_stdout(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench", str(bundle), "--batch", "1,3", "--json", *QUICK]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [(cell["runtime"], cell["batch"]) for cell in data["cells"]] == [("ort-cpu", 1), ("ort-cpu", 3)]
    names = [latency["name"] for latency in data["cells"][0]["latencies"]]
    assert names == ["dense", "dense (again)", "a30", "b50"]
    assert "packages" in data["environment"]
    assert "samples" not in data["cells"][0]


def test_table_states_every_model_and_the_self_check(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench", str(bundle), *QUICK]) == 0
    out = capsys.readouterr().out
    assert "ort-cpu on" in out
    assert "baseline" in out
    assert "Self-check" in out
    assert all(name in out for name in ("dense (again)", "a30", "b50"))


def test_output_file_holds_every_raw_timing(bundle: Path, tmp_path: Path) -> None:
    assert run_command(["bench", str(bundle), "-o", str(tmp_path / "out" / "bench.json"), "--json", *QUICK]) == 0
    cell = json.loads((tmp_path / "out" / "bench.json").read_text())["cells"][0]
    report = summarise(Samples.from_json(cell.pop("samples")))
    assert json.loads(json.dumps(report.to_json())) == cell


def test_failed_self_check_marks_every_row(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.report.LatencyReport.trusted", property(lambda self: False))
    assert run_command(["bench", str(bundle), *QUICK]) == 0
    out = capsys.readouterr().out
    assert out.count("(untrusted)") == 3
    assert "Self-check FAILED" in out


def test_text_model_gets_a_sequence_of_128_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(save_embedder(tmp_path / "m.onnx"))
    for options, lengths in (([], [128]), (["--seq", "5,6"], [5, 6])):
        assert run_command(["bench", path, "--json", *options, *QUICK]) == 0
        assert [cell["sequence"] for cell in json.loads(capsys.readouterr().out)["cells"]] == lengths


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--batch", "0"], 2, "--batch"),
        (["--batch", "1,x"], 2, "--batch"),
        (["--batch", "-1"], 2, "--batch"),
        (["--batch", "2,2"], 2, "--batch"),
        (["--seq", "8"], 2, "no input has a dynamic sequence"),
        (["--threads", "0"], 2, "--threads"),
        (["--seconds", "0"], 2, "--seconds"),
        (["--seconds", "nan"], 2, "--seconds"),
        (["--runtime", "ort-cpi"], 2, "Did you mean 'ort-cpu'"),
    ],
)
def test_wrong_request_is_refused_before_anything_is_timed(
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.setattr("bench.timing.measure", lambda *a, **k: pytest.fail("timed"))
    assert run_command(["bench", str(bundle), *options]) == code
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_absent_runtime_exits_3_and_times_nothing_on_the_cpu(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.runtimes.ort_cuda.OrtCuda.available", lambda self: "no GPU answers")
    monkeypatch.setattr("bench.timing.measure", lambda *a, **k: pytest.fail("timed"))
    assert run_command(["bench", str(bundle), "--runtime", "ort-cpu,ort-cuda"]) == 3
    assert "no GPU answers" in capsys.readouterr().err


def test_first_loose_file_is_the_baseline(tmp_path: Path) -> None:
    paths = [str(save_mlp(tmp_path / name)) for name in ("z.onnx", "a.onnx")]
    assert list(find_models(paths)) == ["z", "a"]


def test_files_of_one_name_are_told_apart_by_their_directories(tmp_path: Path) -> None:
    paths = [str(save_mlp(tmp_path / folder / "model.onnx")) for folder in ("old", "new")]
    assert list(find_models(paths)) == ["old/model", "new/model"]
    with pytest.raises(UsageError, match="same name"):
        find_models([paths[0], paths[0]])


def test_manifest_decides_what_a_bundle_holds(bundle: Path) -> None:
    manifest(bundle, b50="models/b50.onnx", dense="models/dense.onnx")
    assert find_models([str(bundle)]) == {"dense": bundle / "models/dense.onnx", "b50": bundle / "models/b50.onnx"}


def test_manifest_that_leaves_the_bundle_or_names_no_file_is_refused(bundle: Path) -> None:
    shutil.copy(bundle / "models/dense.onnx", bundle.parent / "outside.onnx")
    for file, words in (("../outside.onnx", "outside the bundle"), ("models/gone.onnx", "missing")):
        manifest(bundle, dense="models/dense.onnx", bad=file)
        with pytest.raises(ArtifactError, match=words):
            find_models([str(bundle)])
    (bundle / "manifest.json").write_text("[]")
    with pytest.raises(ArtifactError, match="does not list"):
        find_models([str(bundle)])


def test_bundle_without_dense_model_or_beside_others_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="timed alone"):
        find_models([str(bundle), str(bundle)])
    (bundle / "models/dense.onnx").unlink()
    with pytest.raises(UsageError, match="no dense model"):
        find_models([str(bundle)])
    with pytest.raises(UnavailableError, match="nowhere"):
        find_models([str(tmp_path / "nowhere")])


def test_models_with_other_inputs_than_the_baseline_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(save_mlp(tmp_path / "dense.onnx")), str(save_embedder(tmp_path / "other.onnx"))]
    assert run_command(["bench", *paths, *QUICK]) == 2
    assert "not those of the model in other" in capsys.readouterr().err


def test_output_that_cannot_be_written_is_refused_before_timing(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run_command(["bench", str(bundle), "-o", str(tmp_path / "file" / "bench.json"), *QUICK]) == 3
    assert "cannot write there" in capsys.readouterr().err


def test_counts_are_read_in_the_order_given() -> None:
    assert counts("--batch", "8, 1,32") == [8, 1, 32]
