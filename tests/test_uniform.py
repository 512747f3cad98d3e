"""The uniform layout: equal layers, nested plans, and checkpoints that stock libraries load without this package."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from forms import random_path, signature_of

from converters.stock import FAMILIES, save_stock, stock_kinds, stock_model
from converters.surgery import compact
from deploy_prune.errors import BudgetError, PlanError, UnsupportedModelError, UsageError
from deploy_prune.uniform import uniform_plan
from deploy_prune.units import UnitKind

HF = [
    "tiny_bert",
    "tiny_roberta",
    "tiny_electra",
    "tiny_albert",
    "tiny_distilbert",
    "tiny_llama",
    "tiny_mistral",
    "tiny_qwen2",
    "tiny_qwen3",
    "tiny_smollm3",
    "tiny_opt",
    "tiny_opt_350m",
    "tiny_gpt2",
    "tiny_hf_vit",
    "tiny_hf_deit",
]
TIMM = ["tiny_vit", "tiny_deit_distilled", "tiny_deit3"]
NONE = [
    "tiny_swin",
    "tiny_hf_swin",
    "tiny_clip",
    "tiny_mobilellm",
    "tiny_hf_dinov2",
    "tiny_timm_dinov2",
    "tiny_vit_qk_norm",
]

# What somebody runs who never heard of this package.
STOCK = """
import sys
for name in ("deploy_prune", "converters", "bench"):
    sys.modules[name] = None  # an import of it fails
import numpy as np, torch
kind, directory, inputs, outputs = sys.argv[1:]
given = {name: torch.from_numpy(value) for name, value in np.load(inputs).items()}
if kind == "timm":
    import timm
    model = timm.create_model("local-dir:" + directory, pretrained=True)
    call = lambda: model(given["pixel_values"])
else:
    import transformers
    model = getattr(transformers, kind).from_pretrained(directory)
    call = lambda: model(**given).logits
model.eval()
with torch.no_grad():
    np.save(outputs, call().numpy())
"""


def uniform(model, name, share=0.3, seed=1):
    kinds = [kind.value for kind in stock_kinds(model)]
    return uniform_plan(random_path(model, signature_of(name), seed=seed), share, kinds=kinds)


@pytest.mark.parametrize("name", [*HF, *TIMM])
def test_stock_class_holds_the_compact_model_and_computes_the_same(name, request):
    model, signature = request.getfixturevalue(name), signature_of(name)
    plan = uniform(model, name)
    assert plan.achieved.sparsity >= 0.3
    small = compact(model, plan)
    stock = stock_model(small)
    assert type(stock) is type(model)
    inputs = signature.random_inputs({"batch": 2, "sequence": 9}, seed=0, padding=True)
    with torch.no_grad():
        torch.testing.assert_close(signature.call(stock, inputs), signature.call(small, inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_distilbert", "tiny_vit"])
def test_checkpoint_loads_where_this_package_cannot_be_imported(name, request, tmp_path):
    model, signature = request.getfixturevalue(name), signature_of(name)
    small = compact(model, uniform(model, name))
    save_stock(small, tmp_path / "stock")
    inputs = signature.random_inputs({"batch": 2, "sequence": 9}, seed=0)
    np.savez(tmp_path / "inputs.npz", **{key: value.numpy() for key, value in inputs.items()})
    kind = "timm" if name in TIMM else type(model).__name__
    files = [str(tmp_path / part) for part in ("stock", "inputs.npz", "outputs.npy")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STOCK, kind, *files],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "not initialized" not in done.stderr
    with torch.no_grad():
        expected = signature.call(small, inputs).numpy()
    np.testing.assert_allclose(np.load(files[-1]), expected, rtol=1e-5, atol=1e-6)


def test_all_layers_keep_equally_many_and_each_its_own_best(tiny_llama):
    path = random_path(tiny_llama, signature_of("tiny_llama"), seed=2)
    plan = uniform_plan(path, 0.3, kinds=["head", "neuron"])
    counts = plan.counts(path.sites)
    for kind, site_kind in ((UnitKind.NEURON, "mlp"), (UnitKind.HEAD, "attn")):
        assert len({own[kind] for name, own in counts.items() if site_kind in name}) == 1
    for site in path.sites:
        if UnitKind.NEURON in site.counts:
            scores, kept = path.scores[f"{site.name}/neuron"], plan.kept(site, UnitKind.NEURON)
            assert min(scores[kept]) > max(np.delete(scores, kept))


def test_uniform_plans_are_nested_and_exact(tiny_distilbert):
    path = random_path(tiny_distilbert, signature_of("tiny_distilbert"), seed=3)
    plans = [uniform_plan(path, share, kinds=["neuron"]) for share in (0.2, 0.4, 0.6, 0.8)]
    assert all(small.is_nested_in(large) for large, small in itertools.pairwise(plans))
    for plan in plans:
        small = compact(tiny_distilbert, plan)
        assert sum(p.numel() for p in small.parameters()) == plan.achieved.params


def test_alignment_and_other_budgets_hold(tiny_distilbert):
    path = random_path(tiny_distilbert, signature_of("tiny_distilbert"), seed=3)
    plan = uniform_plan(path, budget="params", value=0.9, kinds=["neuron"], align=8)
    assert plan.achieved.params <= 0.9 * path.costs.params
    assert all(len(kinds[UnitKind.NEURON]) % 8 == 0 for kinds in plan.keep.values() if UnitKind.NEURON in kinds)


def test_a_target_out_of_reach_names_what_is_in_reach(tiny_llama):
    path = random_path(tiny_llama, signature_of("tiny_llama"))
    with pytest.raises(BudgetError, match=r"best reachable: 0\.\d+ \(kinds head"):
        uniform_plan(path, 0.9, kinds=["head"])


def test_kinds_that_the_stock_class_cannot_say_are_refused_with_the_reason(tiny_distilbert, tiny_llama):
    with pytest.raises(UsageError, match=r"head: the stock class makes a head as wide as hidden size"):
        stock_kinds(tiny_distilbert, (UnitKind.HEAD, UnitKind.NEURON))
    with pytest.raises(UsageError, match=r"qk: the stock class turns all dimensions of a head by rotary embedding"):
        stock_kinds(tiny_llama, (UnitKind.QK,))
    assert stock_kinds(tiny_llama, (UnitKind.HEAD,)) == (UnitKind.HEAD,)


@pytest.mark.parametrize("name", NONE)
def test_families_without_a_uniform_layout_are_refused(name, request):
    with pytest.raises(UnsupportedModelError, match="have no uniform layout"):
        stock_kinds(request.getfixturevalue(name))


def test_a_model_that_timm_does_not_build_has_no_uniform_layout():
    from deploy_prune.demo import digits_vit_untrained

    with pytest.raises(UnsupportedModelError, match=r"digits_vit_untrained builds this one"):
        stock_kinds(digits_vit_untrained())


def test_an_uneven_model_is_refused_by_layer(tiny_llama):
    small = compact(tiny_llama, random_path(tiny_llama, signature_of("tiny_llama"), seed=1).plan(0.4))
    with pytest.raises((PlanError, UnsupportedModelError), match=r"layers.0"):
        stock_model(small)


def test_layers_of_unlike_size_have_no_uniform_plan(tiny_swin):
    path = random_path(tiny_swin, signature_of("tiny_swin"))
    with pytest.raises(UnsupportedModelError, match=r"neuron: layers.0.* has \d+, layers.1.* has \d+"):
        uniform_plan(path, 0.3, kinds=["neuron"])


def test_every_family_says_what_may_go():
    assert all(keys and why for keys, why in FAMILIES.values())
