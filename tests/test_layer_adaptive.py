"""Layer-adaptive and fine-grained searches: layers share the cut as the ratio rule says, along one nested path."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from forms import FEW, random_path, signature_of
from torch import nn

from deploy_prune.adapters import find_sites
from deploy_prune.demo import digits_vit_untrained
from deploy_prune.errors import DataError, UsageError
from deploy_prune.methods import search
from deploy_prune.methods.base import Context
from deploy_prune.methods.compute import Compute
from deploy_prune.methods.layer_ratios import normalised, removal_ratios
from deploy_prune.methods.layer_schedule import scheduled
from deploy_prune.methods.site_importance import site_importance
from deploy_prune.path import SolutionPath
from deploy_prune.tasks import load_task
from deploy_prune.units import groups, unit_key

MEASURES = ("gradient", "activation", "combined")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return digits_vit_untrained()


def digits(model, **data):
    where = {"calibration": "digits:train", "evaluation": "digits:test"} | data
    return load_task(
        "image-classification", model=model, model_ref="python:deploy_prune.demo:digits_vit_untrained", **where
    )


@pytest.fixture(scope="module")
def task(model):
    return digits(model)


def context_of(model, task, **compute):
    path = random_path(model, task.signature)
    model.eval().requires_grad_(False)
    return Context(model, path.sites, path.costs, task, 48, 16, "fp32", 0, compute=Compute(**compute))


def scheduled_path(model, name, importance, *, comparable, seed=0):
    """A path of random scores within layers under the given layer importances."""
    like = random_path(model, signature_of(name), seed)
    generator = torch.Generator().manual_seed(seed)
    scores = {
        unit_key(s.name, k): torch.rand(s.units(k), generator=generator, dtype=torch.float64)
        for s, k in groups(like.sites)
    }
    own = dict(zip((s.name for s in like.sites), importance, strict=True))
    found = scheduled(like.sites, like.costs, scores, own, comparable=comparable)
    return SolutionPath.from_importance(
        {key: value.numpy() for key, value in found.items()},
        model="tiny",
        weights_sha256=like.weights_sha256,
        sites=like.sites,
        costs=like.costs,
        method="layer-adaptive",
    )


@pytest.mark.parametrize("comparable", [True, False])
@pytest.mark.parametrize("name", FEW)
def test_a_plan_has_the_ratios_of_its_amount_to_one_unit(name, comparable, request):
    model = request.getfixturevalue(name)
    sites = find_sites(model)
    importance = normalised(np.random.default_rng(1).random(len(sites)))
    path = scheduled_path(model, name, importance, comparable=comparable)
    costs = path.costs
    sizes = np.array([costs.prunable([s]) for s in sites])
    unit = np.array([max(costs.unit_params(s, k) for k in s.counts) + costs.alone[s.name] for s in sites])
    for sparsity in (0.1, 0.3, 0.5, 0.8):
        counts = path.plan(sparsity).counts(sites)
        full = {s.name: dict(s.counts) for s in sites}
        gone = np.array([costs.params_of([s], full) - costs.params_of([s], counts) for s in sites])
        ratios = removal_ratios(importance, sizes, sparsity)
        assert (np.abs(gone - ratios * sizes) <= 2 * unit + sizes.max() * 0.02).all()
        assert sparsity <= gone.sum() / sizes.sum() < sparsity + unit.max() / sizes.sum() + 1e-9


def test_plans_of_a_schedule_are_nested(tiny_llama):
    path = scheduled_path(tiny_llama, "tiny_llama", [0.0, 1.0, 0.4, 0.9], comparable=False)
    plans = [path.plan(s) for s in np.linspace(0.02, 0.98, 25)]
    assert all(small.is_nested_in(large) for large, small in pairwise(plans))
    spared = path.sites[1]
    assert all(len(p.kept(spared, k)) == spared.units(k) for p in plans[:8] for k in spared.counts)


def test_units_leave_a_layer_by_their_score(tiny_vit):
    path = scheduled_path(tiny_vit, "tiny_vit", [0.5] * 4, comparable=False)
    generator = torch.Generator().manual_seed(0)
    for s, k in groups(path.sites):
        scores = torch.rand(s.units(k), generator=generator, dtype=torch.float64).view(s.lanes(k), -1)
        order = path.scores[unit_key(s.name, k)].reshape(s.lanes(k), -1)
        assert (scores.argsort(1).numpy() == order.argsort(1)).all()


def test_scores_that_are_no_numbers_are_refused(tiny_vit):
    path = random_path(tiny_vit, signature_of("tiny_vit"))
    scores = {unit_key(s.name, k): torch.full((s.units(k),), torch.nan) for s, k in groups(path.sites)}
    with pytest.raises(UsageError, match="scores are not finite"):
        scheduled(path.sites, path.costs, scores, {s.name: 0.0 for s in path.sites}, comparable=False)


@pytest.mark.parametrize("measure", MEASURES)
def test_the_importance_of_a_site_is_what_its_equation_says(model, task, measure):
    context = context_of(model, task)
    found = site_importance(context, measure)
    site = context.sites[2]
    out = model.get_submodule(site.out)
    values = []
    for batch in context.batches("by hand"):
        for row in range(len(batch)):
            image = batch.inputs["pixel_values"][row : row + 1]
            kept = []
            handle = out.register_forward_hook(lambda _, __, y, kept=kept: kept.append(y.requires_grad_()) or y)
            logits = model(image)
            handle.remove()
            loss = nn.functional.cross_entropy(logits, batch.target[row : row + 1])
            (g,) = torch.autograd.grad(loss, kept)
            y, g = kept[0].detach()[0], g[0]
            values.append(
                {
                    "gradient": g.norm(),
                    "activation": y.norm(dim=1).mean() / y.shape[1] ** 0.5,
                    "combined": (g.norm(dim=1) * y.norm(dim=1)).sum(),
                }[measure]
            )
    assert found[site.name] == pytest.approx(float(torch.stack(values).mean()), rel=1e-4)


@pytest.mark.parametrize("measure", MEASURES)
def test_pieces_and_recomputed_activations_change_nothing(model, task, measure):
    from deploy_prune.methods import placed

    whole = site_importance(context_of(model, task), measure)
    compute = {"micro_batch": 5, "activation_checkpointing": True}
    context = context_of(model, task, **compute)
    with placed(model, context.sites, context.compute):
        pieces = site_importance(context, measure)
    assert pieces == pytest.approx(whole, rel=1e-5)


def test_a_layer_that_adds_nothing_gives_everything_first(task):
    torch.manual_seed(0)
    model = digits_vit_untrained()
    idle = find_sites(model)[3]
    with torch.no_grad():
        model.get_submodule(idle.out).weight.zero_()
        model.get_submodule(idle.out).bias.zero_()
    path = search(model, task, "layer-adaptive", examples=48, precision="fp32", importance="activation")
    gone = 1 - len(path.plan(0.1).kept(idle, next(iter(idle.counts)))) / idle.units(next(iter(idle.counts)))
    others = [s for s in path.sites if s.name != idle.name]
    rest = [1 - len(path.plan(0.1).kept(s, k)) / s.units(k) for s in others for k in [s.vanishing_kind]]
    assert gone > max(rest)
    assert path.options["found"]["layers"][idle.name]["importance"] == 0.0


def test_power_makes_layers_more_unequal(model, task):
    def spread(power):
        path = search(model, task, "layer-adaptive", examples=48, precision="fp32", importance_power=power)
        counts = path.plan(0.4).counts(path.sites)
        return np.std([counts[s.name][s.vanishing_kind] / s.counts[s.vanishing_kind] for s in path.sites])

    assert spread(0.2) != spread(3.0)


def test_gradients_need_labels_and_activations_do_not(model, task):
    context = context_of(model, task)

    class Unlabeled(type(task)):
        def calibration_batches(self, order):
            for batch in super().calibration_batches(order):
                yield type(batch)(batch.inputs, None, batch.items)

    bare = Unlabeled.__new__(Unlabeled)
    bare.__dict__.update(task.__dict__)
    context = context_of(model, bare)
    assert site_importance(context, "activation")
    with pytest.raises(DataError, match="labeled"):
        site_importance(context, "combined")


def test_bad_options_are_named(model, task):
    with pytest.raises(UsageError, match="importance_power"):
        search(model, task, "layer-adaptive", importance_power=-1)
    with pytest.raises(UsageError, match="within"):
        search(model, task, "layer-adaptive", within="nothing")
