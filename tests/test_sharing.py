"""Blocks that serve several depths: one gate, one cut, one set of weights in every file."""

from __future__ import annotations

import pytest
import torch
from forms import output, random_path, signature_of

from converters.checkpoint import save_pruned
from converters.surgery import compact
from deploy_prune.adapters import find_sites
from deploy_prune.architecture import Architecture
from deploy_prune.errors import UnsupportedModelError, UsageError
from deploy_prune.refitting import collect_moments
from deploy_prune.sharing import share_blocks
from deploy_prune.tasks.base import Batch

SIGNATURE = signature_of("tiny_mobilellm")


def test_a_shared_block_is_one_site(tiny_mobilellm):
    names = [f"model.layers.{depth}.{part}" for depth in (0, 2) for part in ("self_attn", "mlp")]
    assert [site.name for site in find_sites(tiny_mobilellm)] == names


def test_a_shared_block_computes_as_copies_of_it_would(tiny_mobilellm):
    from transformers import LlamaForCausalLM

    copies = LlamaForCausalLM(tiny_mobilellm.config).eval()
    weights = {name.replace(".block", ""): tensor for name, tensor in tiny_mobilellm.state_dict().items()}
    copies.load_state_dict(weights)
    assert sum(p.numel() for p in copies.parameters()) > sum(p.numel() for p in tiny_mobilellm.parameters())
    assert torch.equal(output(tiny_mobilellm, SIGNATURE), output(copies, SIGNATURE))


def test_moments_sum_over_all_uses(tiny_mobilellm):
    sites = find_sites(tiny_mobilellm)
    inputs = SIGNATURE.random_inputs({"batch": 2, "sequence": 7}, seed=0, padding=True)
    moments = collect_moments(tiny_mobilellm, sites, [Batch(inputs, None)], SIGNATURE)
    assert {m.count for m in moments.values()} == {2 * int(inputs["attention_mask"].sum())}


def test_the_same_module_listed_twice_is_one_site_but_cannot_be_saved(tiny_llama, tmp_path):
    tiny_llama.model.layers[1] = tiny_llama.model.layers[0]
    signature = signature_of("tiny_llama")
    plan = random_path(tiny_llama, signature).plan(0.3)
    assert len(plan.keep) == 2
    with pytest.raises(UsageError, match="share blocks"):
        save_pruned(compact(tiny_llama, plan), plan, tmp_path / "small")


def test_the_config_remembers_the_pattern(tiny_mobilellm):
    again = Architecture.of(tiny_mobilellm).build()
    assert {name: p.shape for name, p in again.named_parameters()} == {
        name: p.shape for name, p in tiny_mobilellm.named_parameters()
    }


@pytest.mark.parametrize("pattern", [(0, 0), (0, 0, 1, 1), (1, 1, 2, 2), (0, 0, 5, 2)])
def test_pattern_that_does_not_name_earlier_owners_is_refused(tiny_mobilellm, pattern):
    plain = type(tiny_mobilellm)(
        type(tiny_mobilellm.config)(**{**tiny_mobilellm.config.to_dict(), "shared_blocks": None})
    )
    with pytest.raises(UsageError, match="pattern of shared blocks"):
        share_blocks(plain, pattern)


def test_models_without_a_config_cannot_share(tiny_vit):
    with pytest.raises(UnsupportedModelError, match="config"):
        share_blocks(tiny_vit, (0, 0))
