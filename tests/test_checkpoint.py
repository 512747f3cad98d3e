"""Checkpoints: what was saved is loaded bit for bit, or refused with every reason."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from shipped import MODELS, SIGNATURES
from test_parity import make_plan

from converters.checkpoint import load_pruned, own_tensors, save_pruned
from converters.surgery import compact
from deploy_prune.architecture import Architecture
from deploy_prune.errors import ArtifactError, PlanError, UnavailableError, UsageError
from deploy_prune.files import sha256_file, write_json


@pytest.fixture
def saved(tiny_vit, tmp_path):
    """(compact tiny ViT, its checkpoint directory)."""
    _, plan = make_plan(tiny_vit)
    small = compact(tiny_vit, plan)
    return small, save_pruned(small, plan, tmp_path / "s30", base_model="timm:tiny")


@pytest.mark.parametrize("name", MODELS)
def test_loaded_model_gives_the_same_outputs_bit_for_bit(name, request, tmp_path):
    model, signature = request.getfixturevalue(name), SIGNATURES[name]
    _, plan = make_plan(model)
    small = compact(model, plan)
    save_pruned(small, plan, tmp_path / "c", base_model=name)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    loaded = load_pruned(tmp_path / "c")
    assert torch.equal(torch.random.get_rng_state(), before)
    inputs = signature.random_inputs({"batch": 3, "sequence": 9}, seed=0, padding=True)
    with torch.no_grad():
        assert torch.equal(signature.call(loaded, inputs), signature.call(small, inputs))
    assert not any(module.training for module in loaded.modules())
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}


def test_loaded_model_can_be_saved_again_to_the_same_bytes(saved, tmp_path):
    from deploy_prune.plan import PrunePlan

    _, directory = saved
    plan = PrunePlan.load(directory / "plan.json")
    again = save_pruned(load_pruned(directory), plan, tmp_path / "again", base_model="timm:tiny")
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in directory.iterdir()}


def test_tied_embeddings_are_stored_once_and_stay_tied(tiny_llama, tmp_path):
    _, plan = make_plan(tiny_llama)
    small = compact(tiny_llama, plan)
    save_pruned(small, plan, tmp_path / "c", base_model="llama")
    assert "lm_head.weight" not in load_file(tmp_path / "c/model.safetensors")
    loaded = load_pruned(tmp_path / "c")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert sum(t.numel() for t in own_tensors(loaded).values()) == sum(p.numel() for p in loaded.parameters())


def test_attention_implementation_is_kept(tiny_bert, tmp_path):
    tiny_bert.set_attn_implementation("eager")
    _, plan = make_plan(tiny_bert)
    save_pruned(compact(tiny_bert, plan), plan, tmp_path / "c", base_model="bert")
    assert load_pruned(tmp_path / "c").config._attn_implementation == "eager"


def rewrite(directory, change):
    """Change the stored tensors and make the record agree with the new file."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    record = json.loads((directory / "checkpoint.json").read_text())
    write_json(directory / "checkpoint.json", {**record, "sha256": sha256_file(path)})


def test_every_missing_unexpected_and_misshapen_tensor_is_listed_at_once(saved):
    def change(tensors):
        del tensors["head.bias"]
        tensors["head.extra"] = torch.zeros(2)
        tensors["blocks.0.mlp.fc1.bias"] = torch.zeros(96)
        tensors["blocks.1.mlp.fc1.bias"] = torch.zeros(95)

    rewrite(saved[1], change)
    with pytest.raises(ArtifactError) as caught:
        load_pruned(saved[1])
    assert caught.value.problems == (
        "missing: head.bias",
        "unexpected: head.extra",
        "blocks.0.mlp.fc1.bias: the file has shape (96,), the model (64,)",
        "blocks.1.mlp.fc1.bias: the file has shape (95,), the model (64,)",
    )


def test_weights_of_another_type_are_refused(saved):
    rewrite(saved[1], lambda tensors: tensors.update({"head.bias": tensors["head.bias"].half()}))
    with pytest.raises(ArtifactError, match=r"head.bias: torch.float16, expected torch.float32"):
        load_pruned(saved[1])


def test_flipped_bit_in_the_weights_is_refused(saved):
    path = saved[1] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="expected: sha256"):
        load_pruned(saved[1])


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json", "architecture.json", "checkpoint.json"])
def test_missing_file_is_named(saved, name):
    (saved[1] / name).unlink()
    with pytest.raises(UnavailableError, match=name):
        load_pruned(saved[1])


def test_plan_of_another_model_is_refused(saved):
    write_json(
        saved[1] / "architecture.json",
        {
            "library": "timm",
            "name": "vit_tiny_patch16_224",
            "arguments": {
                "img_size": 32,
                "patch_size": 8,
                "embed_dim": 48,
                "depth": 1,
                "num_heads": 3,
                "mlp_ratio": 2.0,
            },
        },
    )
    with pytest.raises(ArtifactError, match=r"does not fit the architecture(.|\n)*blocks.1.attn: no such site"):
        load_pruned(saved[1])


@pytest.mark.parametrize("change", [{"_version": 2}, {"_type": "Other"}, {"sha256": None}])
def test_record_of_another_kind_is_refused(saved, change):
    record = json.loads((saved[1] / "checkpoint.json").read_text())
    write_json(saved[1] / "checkpoint.json", {**record, **change})
    with pytest.raises(ArtifactError, match="checkpoint"):
        load_pruned(saved[1])


def test_plan_that_does_not_match_the_model_is_not_saved(tiny_vit, tmp_path):
    _, plan = make_plan(tiny_vit)
    with pytest.raises(PlanError, match=r"blocks.0.attn: has 3 head units, the plan keeps 2"):
        save_pruned(tiny_vit, plan, tmp_path / "c", base_model="timm:tiny")
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_does_not_run_code_unasked(saved):
    path = saved[1] / "architecture.json"
    write_json(path, {"library": "python", "name": "os:system", "arguments": {"command": "false"}})
    with pytest.raises(UsageError, match=r"would run Python code(.|\n)*os:system"):
        load_pruned(saved[1])
    write_json(path, {"library": "timm", "name": "hf-hub:somebody/model", "arguments": {}})
    with pytest.raises(ArtifactError, match="not a timm architecture"):
        load_pruned(saved[1])


def build_small_vit():
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)


def test_python_model_loads_when_its_code_is_trusted(tmp_path):
    architecture = Architecture("python", "test_checkpoint:build_small_vit")
    model = architecture.build()
    _, plan = make_plan(model)
    save_pruned(compact(model, plan), plan, tmp_path / "c", base_model="python:own")
    assert load_pruned(tmp_path / "c", trust_code=True).blocks[0].attn.num_heads == 2


def test_extra_files_and_tokenizer_are_kept(tiny_vit, tmp_path):
    class Tokenizer:
        def save_pretrained(self, directory):
            directory.mkdir()
            (directory / "vocab.txt").write_text("[PAD]")

    _, plan = make_plan(tiny_vit)
    (tmp_path / "labels.txt").write_text("cat\n")
    small = compact(tiny_vit, plan)
    directory = save_pruned(
        small,
        plan,
        tmp_path / "c",
        base_model="m",
        tokenizer=Tokenizer(),
        extra={"labels.txt": tmp_path / "labels.txt"},
    )
    assert (directory / "labels.txt").read_text() == "cat\n"
    assert (directory / "tokenizer/vocab.txt").exists()
    with pytest.raises(UsageError, match=r"plan.json"):
        save_pruned(small, plan, tmp_path / "d", base_model="m", extra={"plan.json": tmp_path / "labels.txt"})
