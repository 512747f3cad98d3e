"""Dynamic training: units leave and come back at a constant budget, and what comes out is a legal plan."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from digits import digits_task
from forms import random_path, relative_error, signature_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.surgery import compact
from deploy_prune.cli.inspect import command
from deploy_prune.demo import digits_vit
from deploy_prune.dynamic.history import History, plot_history, rows
from deploy_prune.dynamic.optimiser_state import renew
from deploy_prune.dynamic.options import DynamicOptions
from deploy_prune.dynamic.structure import Structure, exchanged_units
from deploy_prune.dynamic.trained import train_dynamic
from deploy_prune.errors import ArtifactError, UsageError
from deploy_prune.gates import masked
from deploy_prune.methods.compute import Compute
from deploy_prune.saved_state import SavedState
from deploy_prune.units import UnitKind, groups, unit_key

FAMILIES = ("tiny_vit", "tiny_bert", "tiny_llama", "tiny_swin", "tiny_mobilellm", "tiny_vit_qk_norm")
RELAXED = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHORT = {"examples": 200, "steps": 12, "every": 2, "batch_size": 16, "evaluations": 2, "precision": "fp32"}


@pytest.fixture(scope="module")
def model():
    return digits_vit(epochs=3)


@pytest.fixture(scope="module")
def task(model):
    return digits_task(model)


@pytest.fixture(scope="module")
def plan(model, task):
    return random_path(model, task.signature).plan(0.5)


def random_values(sites, generator):
    return {unit_key(s.name, k): generator.random(s.units(k)) for s, k in groups(sites)}


@pytest.mark.parametrize("name", FAMILIES)
@RELAXED
@given(seed=st.integers(0, 10_000), sparsity=st.floats(0.05, 0.9), fraction=st.floats(0.01, 0.9))
def test_every_exchange_leads_to_a_legal_plan_of_the_budget(name, request, seed, sparsity, fraction):
    path = random_path(request.getfixturevalue(name), signature_of(name), seed=seed % 7)
    structure = Structure(path.plan(sparsity), path.sites, path.costs)
    generator = np.random.default_rng(seed)
    dearest = max(path.costs.unit_params(s, k) + path.costs.alone[s.name] for s in path.sites for k in s.counts)
    slack = 2 * dearest / path.costs.prunable(path.sites)
    for _ in range(2):
        structure.exchange(fraction, random_values(path.sites, generator), random_values(path.sites, generator))
        structure.plan.validate_for(path.sites)
        assert structure.sparsity - 1e-9 <= structure.plan.achieved.sparsity <= structure.sparsity + slack
        for site, kind in groups(path.sites):
            kept = set(structure.plan.kept(site, kind))
            opened = set(np.flatnonzero(structure.open[unit_key(site.name, kind)]))
            assert kept <= opened and (kept == opened or kind in (UnitKind.QK, UnitKind.VO))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_important_stays_and_what_pulls_comes(name, request):
    path = random_path(request.getfixturevalue(name), signature_of(name))
    structure = Structure(path.plan(0.5), path.sites, path.costs)
    site = next(s for s in path.sites if UnitKind.NEURON in s.counts and len(structure.plan.kept(s, UnitKind.NEURON)))
    key = unit_key(site.name, UnitKind.NEURON)
    inactive = int(np.flatnonzero(~structure.open[key])[0])
    active = np.flatnonzero(structure.open[key])
    nothing = {unit_key(s.name, k): np.zeros(s.units(k)) for s, k in groups(path.sites)}
    importance = {k: np.ones_like(v) * 1e3 * len(v) for k, v in nothing.items()}
    importance[key][active[0]] = 0.0
    growth = {k: v.copy() for k, v in nothing.items()}
    growth[key][inactive] = 1.0
    before = structure.exchange(0.05, importance, growth)
    left, came = exchanged_units(path.sites, before, structure.plan)
    assert inactive in came[key] and active[0] in left[key]


def test_without_growth_or_importance_the_budget_still_holds(tiny_vit):
    path = random_path(tiny_vit, signature_of("tiny_vit"))
    structure = Structure(path.plan(0.4), path.sites, path.costs)
    nothing = {unit_key(s.name, k): np.zeros(s.units(k)) for s, k in groups(path.sites)}
    structure.exchange(0.3, nothing, nothing)
    assert structure.plan.achieved.sparsity >= structure.sparsity - 1e-9


def test_only_the_asked_kinds_change_and_widths_stay_aligned(tiny_vit):
    path = random_path(tiny_vit, signature_of("tiny_vit"))
    structure = Structure(path.plan(0.5, kinds=["neuron"], align=8), path.sites, path.costs)
    generator = np.random.default_rng(0)
    before = structure.plan
    structure.exchange(0.3, random_values(path.sites, generator), random_values(path.sites, generator))
    left, came = exchanged_units(path.sites, before, structure.plan)
    assert left and came and all(key.endswith("/neuron") for key in [*left, *came])
    counts = structure.plan.counts(path.sites)
    assert all(own[k] % 8 == 0 for own in counts.values() for k in own if k is UnitKind.NEURON)


def test_the_schedule_is_rigls():
    options = DynamicOptions(every=10, drop=0.3, until=0.75)
    assert options.exchanged(10, 400) == pytest.approx(0.15 * (1 + math.cos(math.pi * 10 / 300)))
    assert options.exchanged(150, 400) == pytest.approx(0.15)
    assert options.exchanged(11, 400) == options.exchanged(300, 400) == options.exchanged(390, 400) == 0.0
    assert DynamicOptions().interval(200) == 10


def test_the_state_of_revived_units_is_fresh_and_that_of_others_untouched(tiny_vit):
    sites = random_path(tiny_vit, signature_of("tiny_vit")).sites
    site = next(s for s in sites if UnitKind.NEURON in s.counts)
    tiny_vit.requires_grad_(True)
    optimizer = torch.optim.AdamW(tiny_vit.parameters(), lr=1e-3)
    signature = signature_of("tiny_vit")
    signature.call(tiny_vit, signature.random_inputs({"batch": 2}, seed=0)).square().sum().backward()
    optimizer.step()
    fc1, fc2 = tiny_vit.blocks[0].mlp.fc1, tiny_vit.blocks[0].mlp.fc2
    before = copy.deepcopy(optimizer.state)
    old = {p: {k: v.clone() for k, v in s.items()} for p, s in zip(before, optimizer.state.values(), strict=True)}
    key = unit_key(site.name, UnitKind.NEURON)
    renew(tiny_vit, optimizer, sites, {key: [3]}, {key: [5]})
    state = optimizer.state
    for parameter, rows_ in ((fc1.weight, lambda t: t), (fc2.weight, lambda t: t.T)):
        first, second = rows_(state[parameter]["exp_avg"]), rows_(state[parameter]["exp_avg_sq"])
        assert not first[[3, 5]].any() and not second[3].any()
        assert (second[5] > 0).all() and len(second[5].unique()) == 1
        others = [i for i in range(len(first)) if i not in (3, 5)]
        assert first[others].any()
    assert old and state[fc1.bias]["exp_avg"][[3, 5]].tolist() == [0, 0]
    other = tiny_vit.blocks[1].mlp.fc1.weight
    assert state[other]["exp_avg"].any()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_training_ends_in_weights_and_a_legal_plan_of_the_same_budget(model, task, plan, method):
    found = train_dynamic(model, task, plan, teacher=model, method=method, **SHORT)
    path = random_path(model, task.signature)
    found.plan.validate_for(path.sites)
    assert found.plan.weights_sha256 == plan.weights_sha256 and found.plan.asked == plan.asked
    assert plan.achieved.params - path.costs.params // 10 <= found.plan.achieved.params <= plan.achieved.params
    inputs = task.signature.random_inputs({"batch": 3}, seed=1)
    with torch.no_grad(), masked(found.model, path.sites, found.plan):
        expected = task.signature.call(found.model, inputs)
    small = compact(found.model, found.plan, check_weights=False)
    with torch.no_grad():
        assert relative_error(task.signature.call(small, inputs), expected) < 1e-5
    assert found.history.changes and [c.step for c in found.history.changes] == [2, 4, 6, 8]
    assert found.after >= found.before


def test_weights_of_units_that_are_away_hardly_move(model, task, plan):
    found = train_dynamic(model, task, plan, **SHORT, weight_decay=0.0, patience=None, logits_weight=0, hidden_weight=0)
    assert found.best_step, "the trained weights are the best ones"
    ever = {unit_key(s.name, k): set(plan.kept(s, k)) for s, k in groups(random_path(model, task.signature).sites)}
    for change in found.history.changes:
        for key, units in change.came.items():
            ever[key] |= set(units)
    dense = dict(model.named_parameters())
    for name, parameter in found.model.named_parameters():
        if name.endswith("mlp.fc1.weight"):
            never = [i for i in range(len(parameter)) if i not in ever[name.replace(".fc1.weight", "/neuron")]]
            assert never and torch.equal(parameter[never], dense[name][never])


def test_a_stopped_training_goes_on_to_the_same_bits(model, task, plan, tmp_path):
    whole = train_dynamic(model, task, plan, **SHORT)

    class Stop(Exception):
        pass

    class Stopping(SavedState):
        saves = 0

        def save(self, *args, **more):
            super().save(*args, **more)
            Stopping.saves += 1
            if Stopping.saves == 5:
                raise Stop

    from deploy_prune.dynamic import trained

    own, trained.SavedState = trained.SavedState, Stopping
    try:
        with pytest.raises(Stop):
            train_dynamic(model, task, plan, saved=SavedState(tmp_path, "x", 0.0), **SHORT)
    finally:
        trained.SavedState = own
    again = train_dynamic(model, task, plan, saved=SavedState(tmp_path, "x", 0.0), **SHORT)
    assert again.plan == whole.plan and again.history.to_json() == whole.history.to_json()
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, dict(again.model.named_parameters())[name]), name


def test_history_is_kept_read_again_and_drawn(model, task, plan, tmp_path):
    history = train_dynamic(model, task, plan, **SHORT).history
    history.save(tmp_path / "history.json")
    assert History.load(tmp_path / "history.json").to_json() == history.to_json()
    assert len(rows(history)) == len(history.changes) and history.returned() >= 0
    plot_history(history, tmp_path / "history.png", "digits")
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")
    drawn = CliRunner().invoke(command, [str(tmp_path / "history.json"), "--plot", str(tmp_path / "again.png")])
    assert drawn.exit_code == 0 and "exchanged" in drawn.stdout and (tmp_path / "again.png").exists()
    with pytest.raises(ArtifactError, match="history"):
        History.from_json({"_type": "PrunePlan"})


def test_what_a_dynamic_training_cannot_do_is_said(model, task, plan):
    with pytest.raises(UsageError, match=r"until"):
        train_dynamic(model, task, plan, until=2.0)
    with pytest.raises(UsageError, match="shard"):
        train_dynamic(model, task, plan, compute=Compute(shard=True))
    path = random_path(model, task.signature)
    from deploy_prune.plan import dense_plan

    with pytest.raises(UsageError, match="removes nothing"):
        train_dynamic(model, task, dense_plan("tiny", path.weights_sha256, path.sites))
