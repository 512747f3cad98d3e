"""Adapters cut along with their model load on the compact base and add what they added."""

from __future__ import annotations

import json

import pytest
import torch
from forms import output, random_path, relative_error, signature_of

from converters.adapters_apart import load_apart, save_apart, split_adapters
from converters.surgery import compact
from deploy_prune.errors import UsageError
from deploy_prune.gates import masked
from deploy_prune.recovery.hidden import layers_of
from deploy_prune.recovery.lora import add_adapters

peft = pytest.importorskip("peft")
FAMILIES = ("tiny_vit", "tiny_hf_vit", "tiny_bert", "tiny_distilbert", "tiny_llama", "tiny_gpt2", "tiny_mobilellm")


def random_adapters(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(params=FAMILIES)
def case(request):
    """(model with adapters, plan, signature, output of the masked form)"""
    model, signature = request.getfixturevalue(request.param), signature_of(request.param)
    path = random_path(model, signature)
    plan = path.plan(0.5)
    add_adapters(model, layers_of(model, path.sites), rank=4, alpha=8.0)
    random_adapters(model)
    with masked(model, path.sites, plan):
        expected = output(model, signature)
    return model, plan, signature, expected


def test_base_and_cut_adapters_are_the_masked_model(case):
    model, plan, signature, expected = case
    base, wrapped = split_adapters(model, plan)
    assert relative_error(output(wrapped, signature), expected) < 1e-5
    assert relative_error(output(base, signature), expected) > 1e-2, "the adapters add something"
    for name, module in wrapped.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            layer = module.get_base_layer()
            shape = tuple(layer.weight.shape) if not module.fan_in_fan_out else tuple(layer.weight.shape[::-1])
            assert (module.lora_B["default"].weight.shape[0], module.lora_A["default"].weight.shape[1]) == shape, name


def test_what_is_saved_apart_loads_with_the_same_outputs_and_merges(case, tmp_path):
    model, plan, signature, _ = case
    _, wrapped = split_adapters(model, plan)
    before = output(wrapped, signature)
    save_apart(model, plan, tmp_path / "apart")
    loaded = load_apart(tmp_path / "apart")
    assert torch.equal(output(loaded, signature), before)
    assert relative_error(output(loaded.merge_and_unload(), signature), before) < 1e-5
    settings = json.loads((tmp_path / "apart" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == plan.model


def test_merged_and_apart_are_the_same_model(tiny_bert):
    from deploy_prune.recovery.lora import merge_adapters

    signature = signature_of("tiny_bert")
    path = random_path(tiny_bert, signature)
    plan = path.plan(0.4)
    add_adapters(tiny_bert, layers_of(tiny_bert, path.sites), rank=4, alpha=8.0)
    _, wrapped = split_adapters(random_adapters(tiny_bert), plan)
    apart = output(wrapped, signature)
    merge_adapters(tiny_bert)
    assert relative_error(output(compact(tiny_bert, plan, check_weights=False), signature), apart) < 1e-5


def test_a_users_own_peft_model_is_understood(tiny_distilbert):
    """Some layers only, ranks of their own, rank-stabilised scale."""
    signature = signature_of("tiny_distilbert")
    path = random_path(tiny_distilbert, signature)
    plan = path.plan(0.4)
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_lin", "v_lin", "lin1"], rank_pattern={"q_lin": 2}, use_rslora=True
    )
    model = random_adapters(peft.get_peft_model(tiny_distilbert, config)).eval()
    with masked(model.get_base_model(), path.sites, plan):
        expected = output(model, signature)
    _, wrapped = split_adapters(model, plan)
    assert relative_error(output(wrapped, signature), expected) < 1e-5


def test_adapters_that_cannot_be_cut_are_all_listed(tiny_distilbert, tiny_bert):
    plan = random_path(tiny_distilbert, signature_of("tiny_distilbert")).plan(0.4)
    with pytest.raises(UsageError, match="no layer has an adapter"):
        split_adapters(tiny_distilbert, plan)
    dora = peft.get_peft_model(tiny_distilbert, peft.LoraConfig(r=2, target_modules=["q_lin"], use_dora=True))
    with pytest.raises(UsageError, match="DoRA") as error:
        split_adapters(dora, plan)
    assert len(error.value.problems) == 2
    plan = random_path(tiny_bert, signature_of("tiny_bert")).plan(0.4)
    merged = peft.get_peft_model(tiny_bert, peft.LoraConfig(r=2, target_modules=["query"]))
    merged.merge_adapter()
    with pytest.raises(UsageError, match="merged"):
        split_adapters(merged, plan)
