"""Serving hand-over: run.py prepares inputs as the pipeline did and needs nothing of ours; Triton and the Hub take what
they are given."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from figures import changed
from shipped import bundle_of

from deploy_prune.cli.main import run_command
from deploy_prune.errors import UsageError
from deploy_prune.release.manifest import Manifest, TensorEntry
from deploy_prune.release.serving.triton import config, write_repository

PREPARED = {
    "size": [3, 32, 32],
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.4],
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}


@pytest.fixture
def bundle(tiny_vit, tmp_path):
    path = bundle_of(tiny_vit, tmp_path)
    manifest = Manifest.load(path / "manifest.json")
    task = {"name": "image-classification", "image": PREPARED}
    manifest.model_copy(update={"task": task}).save(path / "manifest.json")
    return path


def runner(bundle: Path) -> Any:
    spec = importlib.util.spec_from_file_location("bundle_run", bundle / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", [(40, 40), (90, 60), (33, 70), (35, 35)])
@pytest.mark.parametrize("how", [{}, {"crop_mode": "squash"}, {"interpolation": "bilinear", "crop_pct": 1.0}])
def test_images_are_prepared_as_in_the_pipeline(bundle, tmp_path, size, how):
    from PIL import Image

    from deploy_prune.tasks.images import Preparation

    settings = {**PREPARED, **how}
    manifest = Manifest.load(bundle / "manifest.json")
    task = {"name": "image-classification", "image": settings}
    manifest.model_copy(update={"task": task}).save(bundle / "manifest.json")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    picture.save(tmp_path / "picture.png")
    import torch

    made = Preparation(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
    expected = made.normalise(torch.from_numpy(np.asarray(made.transform()(picture)))[None]).numpy()
    assert np.array_equal(runner(bundle).image(tmp_path / "picture.png").shape, expected.shape)
    np.testing.assert_allclose(runner(bundle).image(tmp_path / "picture.png"), expected, atol=1e-5)


_ALONE = """
import sys
for name in ("torch", "deploy_prune", "converters", "bench", "timm", "transformers"):
    sys.modules[name] = None  # importing it now fails
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_run_py_needs_neither_torch_nor_deploy_prune(bundle, tmp_path):
    from PIL import Image

    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, str(bundle / "run.py"), "--member", "s02", str(tmp_path / "red.png")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("class ") and len(done.stdout.splitlines()) == 5


def test_run_py_tokenises_as_the_tokenizer_of_the_checkpoint_does(bundle):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(["[CLS]", "[SEP]", "[UNK]", "a", "good", "film"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    (bundle / "checkpoints/s02/tokenizer").mkdir()  # where checkpoints have it, see test_run_py_answers_a_text
    tokenizer.save(str(bundle / "checkpoints/s02/tokenizer/tokenizer.json"))
    manifest = Manifest.load(bundle / "manifest.json")
    entries = [
        TensorEntry(name=name, dtype="int64", shape=["batch", "sequence"], role=role)
        for name, role in (("input_ids", "ids"), ("attention_mask", "mask"))
    ]
    manifest.model_copy(update={"inputs": entries, "task": {"name": "text-classification", "max_length": 4}}).save(
        bundle / "manifest.json"
    )
    inputs = runner(bundle).inputs_of(["a good film"])
    assert inputs["input_ids"].tolist() == [[0, 3, 4, 1]] and inputs["attention_mask"].tolist() == [[1, 1, 1, 1]]


def model_config(text: str) -> Any:
    """`text` parsed by Triton's own schema."""
    from google.protobuf import text_format

    found = importlib.util.find_spec("tritonclient")
    if found is None or not found.submodule_search_locations:
        pytest.skip("tritonclient is not installed")
    place = Path(found.submodule_search_locations[0]) / "grpc/model_config_pb2.py"  # its package would import gRPC
    spec = importlib.util.spec_from_file_location("model_config_pb2", place)
    assert spec is not None and spec.loader is not None
    schema = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("model_config_pb2", schema)
    spec.loader.exec_module(schema)
    return text_format.Parse(text, schema.ModelConfig())


def test_triton_repository_has_a_config_that_tritons_schema_reads(bundle, tmp_path):
    out = tmp_path / "repository"
    assert run_command(["triton", str(bundle), "-o", str(out), "--member", "s02"]) == 0
    assert [p.name for p in out.iterdir()] == ["s02"]
    assert (out / "s02/1/model.onnx").read_bytes() == (bundle / "models/s02.onnx").read_bytes()
    found = model_config((out / "s02/config.pbtxt").read_text())
    assert (found.name, found.backend, found.max_batch_size) == ("s02", "onnxruntime", 32)
    assert [(t.name, t.data_type, list(t.dims)) for t in found.input] == [("images", 11, [3, 32, 32])]  # 11: TYPE_FP32
    assert [(t.name, list(t.dims)) for t in found.output] == [("logits", [5])]
    assert found.dynamic_batching.max_queue_delay_microseconds == 500
    assert found.instance_group[0].kind == found.instance_group[0].KIND_CPU


def test_triton_batches_only_what_begins_with_the_batch(bundle):
    manifest = Manifest.load(bundle / "manifest.json")
    ids = TensorEntry(name="input_ids", dtype="int64", shape=["batch", "sequence"], role="ids")
    text = config(manifest.model_copy(update={"inputs": [ids]}), "s02", gpu=True)
    assert list(model_config(text).input[0].dims) == [-1] and "KIND_GPU" in text
    fixed = manifest.output.model_copy(update={"shape": [1, 5]})
    found = model_config(config(manifest.model_copy(update={"output": fixed}), "s02"))
    assert found.max_batch_size == 0 and not found.HasField("dynamic_batching")
    assert list(found.input[0].dims) == [-1, 3, 32, 32]


def test_triton_refuses_unknown_members_and_a_taken_output(bundle, tmp_path):
    with pytest.raises(UsageError, match="no member 's03'"):
        write_repository(bundle, tmp_path / "r", members=["s03"])
    (tmp_path / "r").mkdir()
    (tmp_path / "r/own").write_text("x")
    with pytest.raises(UsageError, match="taken"):
        write_repository(bundle, tmp_path / "r")


def test_card_has_metadata_that_the_hub_reads(bundle):
    from huggingface_hub import ModelCard

    from deploy_prune.release.card import model_card

    manifest = Manifest.load(bundle / "manifest.json")
    base = manifest.base.model_copy(update={"reference": "hf:google/vit-base?new_head=2"})
    data = ModelCard(model_card(manifest.model_copy(update={"base": base}))).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == (
        "onnx",
        "image-classification",
        "google/vit-base",
    )
    assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [("top1", 0.75)] * 2
    local = manifest.base.model_copy(update={"reference": "hf:/home/me/secret"})
    assert "secret" not in model_card(manifest.model_copy(update={"base": local})).split("---")[1]


def test_push_checks_everything_and_sends_nothing_in_a_dry_run(bundle, monkeypatch, capsys):
    import huggingface_hub

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the dry run called the Hub")

    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, refuse)
    changed(bundle)
    assert run_command(["push", str(bundle), "me/tiny", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "models/s02.onnx" in printed.out and "nothing was sent" in printed.err
    assert run_command(["push", str(bundle), "me/ti ny", "--dry-run"]) == 2
    (bundle / "README.md").write_text("no head\n")
    changed(bundle)
    assert run_command(["push", str(bundle), "me/tiny", "--dry-run"]) == 4


def test_push_uploads_the_bundle_and_explains_a_hub_that_refuses(bundle, monkeypatch):
    import huggingface_hub

    sent: list[Any] = []
    created = type("Created", (), {"repo_id": "me/tiny"})()
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo, **how: sent.append(how) or created)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **how: sent.append(how))
    assert run_command(["push", str(bundle), "me/tiny"]) == 0
    assert sent[0]["private"] and sent[1]["folder_path"] == bundle

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", offline)
    assert run_command(["push", str(bundle), "me/tiny"]) == 3


def test_reproduction_is_compared_part_by_part(bundle, tmp_path):
    import shutil

    from deploy_prune.release.reproduce import compare_runs

    again = Path(shutil.copytree(bundle, tmp_path / "again"))
    assert compare_runs(bundle, again).same
    changed(
        again, s02={"quality": Manifest.load(again / "manifest.json").dense.quality.model_copy(update={"value": 0.5})}
    )
    (again / "models/dense.onnx").unlink()
    found = {part.name: part.kind for part in compare_runs(bundle, again).parts}
    assert found == {
        "models/dense.onnx": "missing",
        "dense top1": "same",
        "plans/s02.json": "same",
        "models/s02.onnx": "same",
        "s02 top1": "other",
    }
    assert json.loads(json.dumps(compare_runs(bundle, again).to_json()))["same"] is False
