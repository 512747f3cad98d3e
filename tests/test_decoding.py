"""Decoding with a key/value cache: a compact decoder writes, token for token, what its masked form writes."""

from __future__ import annotations

import pytest
import torch
from forms import random_path, signature_of

from converters.surgery import compact
from deploy_prune.adapters import find_sites
from deploy_prune.gates import masked
from deploy_prune.plan import plan_from_units
from deploy_prune.units import groups

DECODERS = ("tiny_llama", "tiny_mobilellm", "tiny_mistral", "tiny_qwen3", "tiny_smollm3", "tiny_opt", "tiny_gpt2")


def written(model, tokens=12):
    """What greedy decoding adds to two prompts, the second padded on the left."""
    prompts = torch.tensor([[5, 17, 33, 80], [0, 0, 9, 61]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    return model.generate(
        input_ids=prompts, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
    )


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_compact_decoder_writes_what_the_masked_one_writes(name, attention, request):
    model = request.getfixturevalue(name)
    model.set_attn_implementation(attention)
    plan = random_path(model, signature_of(name), seed=4).plan(0.3)
    with masked(model, find_sites(model), plan):
        expected = written(model)
    assert torch.equal(written(compact(model, plan)), expected)


@pytest.mark.parametrize("name", DECODERS)
def test_positions_go_on_when_the_first_attention_is_gone(name, request):
    model = request.getfixturevalue(name)
    sites = find_sites(model)
    kept = {(s.name, k): range(s.units(k)) if s is not sites[0] else () for s, k in groups(sites)}
    plan = plan_from_units("tiny", random_path(model, signature_of(name)).weights_sha256, sites, kept)
    assert plan.vanishes(sites[0])
    with masked(model, sites, plan):
        expected = written(model)
    assert torch.equal(written(compact(model, plan)), expected)


def test_uses_of_a_shared_block_have_places_of_their_own_in_the_cache(tiny_mobilellm):
    from transformers import DynamicCache

    cache = DynamicCache()
    ids = torch.tensor([[5, 17, 33, 80, 4]])
    with torch.no_grad():
        whole = tiny_mobilellm(ids, use_cache=False).logits
        tiny_mobilellm(ids[:, :3], past_key_values=cache)
        stepped = tiny_mobilellm(ids[:, 3:], past_key_values=cache).logits
    torch.testing.assert_close(stepped, whole[:, 3:], rtol=1e-4, atol=1e-5)
    assert [cache.get_seq_length(depth) for depth in range(4)] == [5] * 4
