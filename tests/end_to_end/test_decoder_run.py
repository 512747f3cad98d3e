"""A recipe with `export.cache`: decoders in the bundle, hashed, verified, and written on from at the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from clockwork import by_size
from decoders import tokenizer, written
from safetensors.numpy import load_file, save_file

from converters.precision.int8 import saturates
from deploy_prune.cli.main import run_command
from deploy_prune.errors import ArtifactError, ParityError
from deploy_prune.files import sha256_file
from deploy_prune.release.bundle import finish
from deploy_prune.release.gate import gate
from deploy_prune.release.manifest import Manifest
from deploy_prune.release.rules import Rules, RuleSet
from deploy_prune.release.verify import verify


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a GPT-2 of one layer: the dense model and one member, in the uniform layout, and both in other precisions."""
    from conftest import randomize
    from transformers import GPT2Config, GPT2LMHeadModel

    room = tmp_path_factory.mktemp("decoder")
    config = GPT2Config(
        vocab_size=99, n_positions=64, n_embd=32, n_layer=1, n_head=4, n_inner=48, eos_token_id=2, bos_token_id=1
    )
    model = randomize(GPT2LMHeadModel(config))
    model.save_pretrained(room / "model")
    tokenizer().save_pretrained(room / "model")
    words = np.random.default_rng(0).integers(0, 95, 2000)
    (room / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    recipe = {
        "name": "tiny",
        "model": f"hf:{room / 'model'}",
        "task": {"name": "causal-lm", "calibration": f"text:{room / 'text.txt'}", "options": {"length": 32}},
        "search": {"method": "magnitude"},
        "family": {"sparsities": [0.3], "layout": "uniform"},
        "refit": {"examples": 16},
        "export": {"cache": True, "last_logits": True, "checkpoints": True},
        "bench": {"seconds": 0.01, "past": [12, 0]},  # without a length: as many tokens as the model has positions for
        "precision": {
            "also": ["fp16", "bf16", "int8-dynamic", "int4-weight-only"],
            "examples": 16,
            "reduce_range": saturates(),
            "agreement": {
                "fp16": 0.9,
                "bf16": 0.7,
                "int8-dynamic": 0.7,
                "int4-weight-only": 0.3,
            },  # untrained, never sure
        },
    }
    (room / "recipe.yaml").write_text(json.dumps(recipe))
    assert run_command(["-q", "run", str(room / "recipe.yaml"), "--out", str(room / "out")]) == 0
    return room / "out"


def test_every_member_has_a_decoder_that_is_named_hashed_and_proved(bundle: Path) -> None:
    manifest = Manifest.load(bundle / "manifest.json")
    assert len(manifest.members) == 10
    for member in manifest.members:
        assert member.decoder is not None
        assert member.decoder.parity["error"] < {"fp32": 1e-5, "fp16": 5e-3}.get(member.precision, 0.3)
        assert {
            f"decoders/{member.name}/model.onnx",
            f"decoders/{member.name}/tokenizer.json",
            f"samples/{member.name}.decoder.safetensors",
        } <= set(manifest.files)
    checks = {check.name: check.runtime for check in verify(bundle).members}
    assert set(checks) == {name + kind for name in names(manifest) for kind in ("", ", decoding")}
    assert checks["s30.bf16, decoding"] == "onnxruntime, bf16 emulated"


def names(manifest: Manifest) -> list[str]:
    return [member.name for member in manifest.members]


def test_caches_of_half_precisions_are_half_as_large(bundle: Path) -> None:
    manifest = Manifest.load(bundle / "manifest.json")
    dtypes = {
        member.name: {entry.dtype for entry in (*member.decoder.inputs[2:], *member.decoder.outputs[1:])}
        for member in manifest.members
        if member.decoder
    }
    assert dtypes["s30.fp16"] == {"float16"} and dtypes["dense.bf16"] == {"bfloat16"}
    assert dtypes["s30"] == dtypes["s30.int8-dynamic"] == {"float32"}
    sizes = {member.name: member.decoder.bytes for member in manifest.members if member.decoder}
    assert sizes["s30.fp16"] < sizes["s30"]


def test_the_card_says_that_only_the_last_logits_are_given(bundle: Path) -> None:
    card = (bundle / "README.md").read_text(encoding="utf-8")
    assert "the logits of the last new token alone" in card
    assert "| –" in card and "| 64 | 0 |" in card  # the plain graphs, and prompts to decoders


def test_run_py_answers_a_text(bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(bundle / "run.py"), "--member", "s30", "w5 w0 w66"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_decoders_are_timed_in_single_steps_where_a_runtime_computes_in_their_precision(bundle: Path) -> None:
    cells = {
        member.name: {(entry.sequence, entry.past) for entry in member.latency}
        for member in Manifest.load(bundle / "manifest.json").members
    }
    assert cells["s30"] == cells["dense.int8-dynamic"] == {(64, None), (None, 12), (64, 0)}
    assert cells["s30.fp16"] == set()
    rules = ["-q", "gate", str(bundle), "--member", "s30", "--max-p50-ms", "1e6", "--no-verify"]
    # As little as was timed here, dense need not agree with itself.
    assert run_command([*rules, "--past", "12", "--allow-unmeasured", "max_p50_ms"]) == 0
    assert run_command([*rules, "--past", "13"]) == 1
    assert run_command([*rules, "--past", "0", "--allow-unmeasured", "max_p50_ms"]) == 0
    assert run_command([*rules, "--past", "0", "--seq", "63"]) == 1
    held = gate(bundle, Rules(rules=[RuleSet(members=["s30"], sequence=64, max_p50_ms=1e6, verify=False)]))
    assert [verdict.cell for verdict in held.verdicts] == ["ort-cpu b1 s64"]  # not the prompt to a decoder


def test_bench_times_the_decoders_of_a_bundle(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-q", "bench", str(bundle), "--past", "4,9", "--batch", "2", "--seconds", "0.01", "--json"]
    assert run_command(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(cell["batch"], cell["past"]) for cell in told["cells"]] == [(2, 4), (2, 9)]
    assert {line["name"] for line in told["cells"][0]["latencies"]} >= {
        "dense",
        "s30",
        "s30.int8-dynamic",
        "s30.int4-weight-only",
    }
    assert told["left_out"]["ort-cpu"]["s30.fp16"] == "fp16"
    assert run_command(["-q", "bench", str(bundle), "--past", "0,4", "--seq", "8", "--seconds", "0.01", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(cell["batch"], cell["sequence"], cell["past"]) for cell in told["cells"]] == [(1, 8, 0), (1, 8, 4)]
    assert run_command(["-q", "bench", str(bundle), "--past", "-1"]) == 2
    assert run_command(["-q", "bench", str(bundle), "--past", "60", "--seq", "8"]) == 2
    assert "more tokens than the model has positions for" in capsys.readouterr().err
    assert run_command(["-q", "bench", str(bundle / "models/s30.onnx"), "--past", "4"]) == 2


@pytest.mark.parametrize("precision", ["fp16", "int8-dynamic", "int4-weight-only"])
def test_generate_writes_with_a_decoder_in_another_precision(
    precision: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(bundle), "--member", f"s30.{precision}", "--prompt", "w5 w0", "--tokens", "8", "--json"]
    assert run_command([*words, "--no-stop"]) == 0
    (text,) = json.loads(capsys.readouterr().out)["texts"]
    assert len(text["tokens"]) == 8


def test_generate_says_that_cpus_do_not_compute_in_bf16(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["-q", "generate", str(bundle), "--member", "s30.bf16", "--prompt", "w5", "--tokens", "2"]) == 3
    assert "--device cuda" in capsys.readouterr().err


def test_swapped_weights_of_a_converted_decoder_are_found_though_its_hashes_are_right(
    bundle: Path, tmp_path: Path
) -> None:
    import onnx
    from onnx import numpy_helper

    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    file = copy / "decoders/s30.fp16/model.onnx"
    proto = onnx.load(file)
    stored = next(i for i in proto.graph.initializer if "c_fc.weight" in i.name)
    values = numpy_helper.to_array(stored).copy()
    values[0], values[1] = values[1].copy(), values[0].copy()
    stored.CopyFrom(numpy_helper.from_array(values, stored.name))
    onnx.save(proto, file)
    manifest = Manifest.load(copy / "manifest.json")
    members = [
        m.model_copy(
            update={"decoder": m.decoder.model_copy(update={"sha256": sha256_file(file), "bytes": file.stat().st_size})}
        )
        if m.name == "s30.fp16" and m.decoder
        else m
        for m in manifest.members
    ]
    (copy / "manifest.json").unlink()
    finish(copy, manifest.model_copy(update={"members": members, "files": {}}))
    with pytest.raises(ArtifactError, match=r"decoders/s30.fp16/model.onnx: .* is off the fp32 weight"):
        verify(copy)


def test_generate_writes_what_the_checkpoint_writes_in_torch(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from converters.checkpoint import load_pruned

    expected = written(load_pruned(bundle / "checkpoints/s30"), [[9, 4, 70], [8]], 20)
    prompts = ["--prompt", "w5 w0 w66", "--prompt", "w4"]
    words = ["generate", str(bundle), "--member", "s30", *prompts, "--tokens", "20", "--no-stop", "--json"]
    assert run_command(words) == 0
    texts = json.loads(capsys.readouterr().out)["texts"]
    assert [line["tokens"] for line in texts] == expected
    assert run_command(["generate", str(bundle / "decoders/s30/model.onnx"), "--prompt", "w4", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("w4")


def test_a_uniform_member_is_also_an_ordinary_checkpoint(bundle: Path) -> None:
    from transformers import GPT2LMHeadModel

    from converters.checkpoint import load_pruned

    stock = GPT2LMHeadModel.from_pretrained(bundle / "stock/s30")
    assert stock.config.n_inner < 48
    assert (bundle / "stock/s30/tokenizer.json").is_file()
    ids = torch.tensor([[9, 4, 70, 11]])
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, load_pruned(bundle / "checkpoints/s30")(ids).logits)


def test_generate_imports_neither_torch_nor_transformers(bundle: Path) -> None:
    code = (
        "import sys; from deploy_prune.cli.main import run_command;"
        f"words = ['-q', 'generate', {str(bundle / 'decoders/s30')!r}, '--prompt', 'w1', '--tokens', '2'];"
        "assert run_command(words) == 0;"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [([], 2), (["--member", "s99"], 2), (["--member", "s30", "--tokenizer", "nowhere.json"], 3)],
)
def test_generate_refuses_what_is_not_there(bundle: Path, words: list[str], code: int) -> None:
    assert run_command(["-q", "generate", str(bundle), "--prompt", "w1", *words]) == code


@pytest.mark.parametrize(
    ("setting", "code", "words"),
    [
        ("bench.past=[64]", 2, "more tokens than the model has positions for"),
        ("bench.past=[-1]", 2, "bench.past"),
        ("bench.seq=[65]", 2, "at most 64"),
        ("bench.runtimes=[torch-cpu]", 2, "decoders with a cache are ONNX files"),
        ("precision.keep_decoder=[nowhere]", 2, "no node is called 'nowhere'"),
        ("export.cache=false", 2, "with `bench.past`"),
    ],
)
def test_what_does_not_go_with_decoders_is_refused(
    setting: str, code: int, words: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(bundle.parent / "recipe.yaml")
    assert run_command(["-q", "run", recipe, "--set", setting, "--out", str(tmp_path / "out")]) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_cells_of_unlike_pasts_are_series_of_their_own(bundle: Path, tmp_path: Path) -> None:
    from deploy_prune.charts import pareto
    from deploy_prune.release.manifest import QualityEntry

    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    manifest = Manifest.load(copy / "manifest.json")
    judged = QualityEntry(metric="perplexity", value=9.0, n=4, interval=(8.0, 10.0), higher_is_better=False)
    members = [m.model_copy(update={"quality": judged}) for m in manifest.members]
    (copy / "manifest.json").unlink()
    finish(copy, manifest.model_copy(update={"members": members, "files": {}}))
    names = {series.name for series in pareto(copy).series}
    assert {"ort-cpu b1 s64", "ort-cpu b1 past 12"} <= names


@pytest.mark.parametrize("name", ["models/s30.onnx", "decoders/s30/model.onnx"])
@pytest.mark.parametrize("how", ["cut short", "gone"])
def test_damage_of_a_model_that_others_are_compared_with_is_told(
    name: str, how: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (copy / name).write_bytes((copy / name).read_bytes()[:1000])
    if how == "gone":
        (copy / name).unlink()
    assert run_command(["-q", "verify", str(copy)]) == 4
    told = capsys.readouterr().err
    assert f"{name}: {'is missing' if how == 'gone' else 'has 1000 bytes'}" in told


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def test_a_flipped_byte_of_a_decoder_is_found(copied: Path) -> None:
    file = copied / "decoders/s30/model.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"decoders/s30/model.onnx: has sha256"):
        verify(copied)
    assert run_command(["-q", "generate", str(copied), "--member", "s30", "--prompt", "w1"]) == 4


def test_a_decoder_that_answers_otherwise_is_found_though_its_hashes_are_right(copied: Path) -> None:
    file = copied / "samples/s30.decoder.safetensors"
    stored = load_file(file)
    stored["0/output"][0, -1, 3] += 1.0
    save_file(stored, file)
    manifest = Manifest.load(copied / "manifest.json")
    (copied / "manifest.json").unlink()
    finish(copied, manifest)
    assert Manifest.load(copied / "manifest.json").files[f"samples/{file.name}"].sha256 == sha256_file(file)
    with pytest.raises(ParityError, match=r"s30, decoding: sample 0: error"):
        verify(copied)


def test_a_cache_is_refused_for_a_task_that_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["-q", "run", "digits", "--set", "export.cache=true", "--out", str(tmp_path / "out")]) == 2
    assert "only decoders have a key/value cache" in capsys.readouterr().err


@pytest.mark.timeout(900)
def test_export_at_a_speedup_of_decoding_times_the_decoders_in_the_precision_that_ships(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed: list[tuple[set[str], set[str]]] = []

    def time(place: Any, files: Mapping[str, Path], **options: Any) -> Any:
        for file in files.values():
            graph = onnx.load(file).graph
            timed.append(({value.name for value in graph.input}, {node.op_type for node in graph.node}))
        return by_size(place, files, **options)

    monkeypatch.setattr("deploy_prune.latency.place.Place.time", time)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "fast"
    export = ["-q", "export", str(bundle / "path.safetensors"), "--speedup", "1.1"]
    asked = ["--past", "12", "--latency-precision", "int8-weight-only", "--threads", "1", "--kinds", "neuron"]
    quick = ["--set", "precision.agreement.int8-weight-only=0.5", "--set", "precision.examples=16"]
    assert run_command([*export, *asked, *quick, "--no-bench", "-o", str(out)]) == 0
    manifest = Manifest.load(out / "manifest.json")
    fit = manifest.members[1].latency_fit
    assert fit is not None and fit.met
    assert (fit.batch, fit.past, fit.precision) == (1, 12, "int8-weight-only")
    assert {member.precision for member in manifest.members} == {"fp32", "int8-weight-only"}
    assert all(member.decoder for member in manifest.members)
    inputs, nodes = timed[0]
    assert "past_key_values.0.key" in inputs and "MatMulNBits" in nodes
    assert run_command(["-q", "verify", str(out)]) == 0
    capsys.readouterr()
    for wrong, said in (
        (["--past", "64"], "more tokens than the model has positions for"),
        (["--past", "12", "--runtime", "torch-cpu"], "decoders with a cache are ONNX files"),
        (["--latency-precision", "fp16"], "ort-cpu does not time models in fp16"),
    ):
        assert run_command([*export, *wrong, "--no-bench", "-o", str(tmp_path / "no")]) == 2
        assert said in capsys.readouterr().err
