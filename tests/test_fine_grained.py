"""Fine-grained search: attention distributions are those the model computes, and their scores what they say."""

from __future__ import annotations

import math

import pytest
import torch
from digits import digits_task
from forms import FAMILIES, SIZES, signature_of
from torch import nn

from deploy_prune.adapters import find_sites
from deploy_prune.demo import digits_vit_untrained
from deploy_prune.errors import UnsupportedModelError
from deploy_prune.methods import search
from deploy_prune.methods.attention_statistics import measured, watching_attention
from deploy_prune.units import SiteKind, UnitKind, unit_key


def watched(model, signature, inputs):
    """Site -> (p, valid), of a forward pass."""
    seen = {}
    sites = find_sites(model)
    with torch.no_grad(), watching_attention(model, sites, lambda s, p, v: seen.setdefault(s, (p, v))) as watch:
        watch.attend(signature, inputs)
        signature.call(model, inputs)
    return sites, seen


@pytest.mark.parametrize("name", FAMILIES)
def test_every_site_of_every_family_shows_distributions(name, request):
    model, signature = request.getfixturevalue(name), signature_of(name)
    inputs = signature.random_inputs(SIZES, seed=0, padding=True)
    sites, seen = watched(model, signature, inputs)
    for site in sites:
        if site.kind is not SiteKind.ATTENTION:
            continue
        p, valid = seen[site.name]
        sums = p.sum(-1).transpose(1, 2)
        sums = sums[valid] if valid is not None else sums
        assert p.shape[1] == site.heads and (p >= 0).all()
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)
    assert {s.name for s in sites if s.kind is SiteKind.ATTENTION} == seen.keys()


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_llama", "tiny_qwen2", "tiny_gpt2", "tiny_mistral", "tiny_hf_vit"])
def test_the_kernel_and_the_plain_form_show_the_same(name, request):
    model, signature = request.getfixturevalue(name), signature_of(name)
    inputs = signature.random_inputs(SIZES, seed=0, padding=True)
    _, fused = watched(model, signature, inputs)
    model.set_attn_implementation("eager")
    _, plain = watched(model, signature, inputs)
    for site, (p, valid) in fused.items():
        own = plain[site][0].transpose(1, 2)
        p = p.transpose(1, 2)
        torch.testing.assert_close(*((t[valid] if valid is not None else t) for t in (p, own)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_timms_two_forms_show_the_output_that_follows(tiny_vit, fused):
    signature = signature_of("tiny_vit")
    for block in tiny_vit.blocks:
        block.attn.fused_attn = fused
    values, read = {}, {}
    site = find_sites(tiny_vit)[0]
    attn = tiny_vit.blocks[0].attn
    attn.qkv.register_forward_hook(lambda _, __, y: values.update(v=y.chunk(3, -1)[2]))
    attn.proj.register_forward_pre_hook(lambda _, args: read.update(x=args[0]))
    _, seen = watched(tiny_vit, signature, signature.random_inputs(SIZES, seed=0))
    p = seen[site.name][0]
    v = values["v"].unflatten(-1, (3, -1)).transpose(1, 2)
    torch.testing.assert_close((p @ v).transpose(1, 2).flatten(2), read["x"], rtol=1e-4, atol=1e-5)


def test_a_head_that_averages_has_no_variance_and_one_that_points_has_most():
    even, point = torch.full((1, 1, 3, 4), 0.25), torch.zeros(1, 1, 3, 4)
    point[..., 0, 1] = point[..., 1, 2] = point[..., 2, 2] = 1.0
    for measure in ("variance", "variance-over-queries", "entropy"):
        total, count = measured(even, None, measure)
        assert float(total / count) == pytest.approx(0.0, abs=1e-6)
    total, count = measured(torch.cat([even, point], 1), None, "variance-over-queries")
    # weights of keys 1 and 2 over the three queries: (1,0,0) and (0,1,1), each with variance 2/9
    assert (total / count).tolist() == pytest.approx([0.0, 4 / 9])


def test_variance_and_entropy_are_what_their_equations_say():
    p = torch.tensor([0.5, 0.25, 0.25, 0.0]).view(1, 1, 1, 4)  # the last key is masked
    total, count = measured(p, None, "variance")
    assert float(total / count) == pytest.approx((0.5 - 1 / 3) ** 2 + 2 * (0.25 - 1 / 3) ** 2, rel=1e-5)
    total, count = measured(p, None, "entropy")
    assert float(total / count) == pytest.approx(1 - 1.5 * math.log(2) / math.log(3), rel=1e-5)


def test_padding_has_no_say():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(2, 3, 5, 5, generator=generator).softmax(-1)
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    for measure in ("variance", "variance-over-queries", "entropy"):
        before = measured(p, valid, measure)
        changed = p.clone()
        changed[1, :, 3:] = torch.eye(5)[:2]
        after = measured(changed, valid, measure)
        torch.testing.assert_close(before[0], after[0])


def test_attention_that_is_not_seen_is_refused(tiny_vit):
    signature = signature_of("tiny_vit")

    class Silent(nn.Module):
        def __init__(self, own):
            super().__init__()
            self.qkv, self.proj = own.qkv, own.proj

        def forward(self, x, **_):
            return self.proj(self.qkv(x).chunk(3, -1)[2])

    sites = find_sites(tiny_vit)
    tiny_vit.blocks[0].attn = Silent(tiny_vit.blocks[0].attn)
    inputs = signature.random_inputs(SIZES, seed=0)
    refused = pytest.raises(UnsupportedModelError, match=r"blocks\.0\.attn")
    with refused, torch.no_grad(), watching_attention(tiny_vit, sites, lambda *_: None):
        signature.call(tiny_vit, inputs)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return digits_vit_untrained()


@pytest.fixture(scope="module")
def task(model):
    return digits_task(model)


def test_a_head_without_a_question_leaves_its_layer_first(model, task):
    """Its queries are 0, so it looks at every key alike."""
    site = next(s for s in find_sites(model) if s.kind is SiteKind.ATTENTION)
    width = site.qk_width
    qkv = model.get_submodule(site.slices[UnitKind.QK][0].layer)
    before = {name: tensor.clone() for name, tensor in qkv.state_dict().items()}
    with torch.no_grad():
        qkv.weight[2 * width : 3 * width] = 0
        qkv.bias[2 * width : 3 * width] = 0
    try:
        for heads in ("variance", "variance-over-queries", "entropy"):
            path = search(model, task, "fine-grained", examples=48, precision="fp32", basis="own", heads=heads)
            assert path.scores[unit_key(site.name, UnitKind.HEAD)].argmin() == 2, heads
    finally:
        qkv.load_state_dict(before)


@pytest.mark.parametrize("options", [{"heads": "taylor", "dimensions": "taylor"}, {"dimensions": "energy"}])
def test_the_alternatives_give_paths_with_the_same_layer_ratios(model, task, options):
    how = {"examples": 48, "precision": "fp32", "importance": "activation"}
    plain, other = (search(model, task, "fine-grained", **how, **more) for more in ({}, options))
    counts = [path.plan(0.4).counts(path.sites) for path in (plain, other)]
    assert counts[0] == counts[1]
    assert plain.plan(0.4).keep != other.plan(0.4).keep
