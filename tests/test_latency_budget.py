"""Members at a latency: the choice is the best there is, plans keep the path's order, what is out of reach says why."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clockwork import time_of
from forms import image_signature, random_path
from torch import nn

from bench.latency_table import LatencyTable, SiteTimes
from bench.report import LatencyReport
from deploy_prune.errors import BudgetError, UsageError
from deploy_prune.kind_losses import (
    LossCurve,
    Losses,
    loss_curve,
    measured_losses,
    non_decreasing,
    site_losses,
)
from deploy_prune.latency import fitting
from deploy_prune.latency.candidates import Search, Way, plan_within
from deploy_prune.latency.choice import Options, choose, counts_of, fastest_ms, options_of
from deploy_prune.latency.fitting import fit_plans, limit_of
from deploy_prune.latency.measure import latency_table
from deploy_prune.latency.place import Place
from deploy_prune.latency.shapes import at_widths, probe, probe_plan, shapes_of
from deploy_prune.path import SolutionPath
from deploy_prune.plan import PrunePlan, Target
from deploy_prune.units import UnitKind

SIGNATURE = image_signature()
EVEN = Losses({kind.value: LossCurve((0.0,), (1.0,)) for kind in UnitKind})
ASKED = Target(budget="speedup", value=2.0, kinds=("head", "qk", "vo", "neuron"), align=8)


@pytest.fixture
def path(tiny_vit: nn.Module) -> SolutionPath:
    return random_path(tiny_vit, SIGNATURE)


def a_table(path: SolutionPath, *, dense: float = 10.0, rest: float = 2.0) -> LatencyTable:
    """Attention takes 2 ms whole, a feed-forward 1 ms, both in proportion to their widths."""
    shapes = []
    for shape in shapes_of(path.sites, path.costs, 8):
        whole = 2.0 if len(shape.kinds) > 1 else 1.0
        points = {shape.full: whole}
        for axis, full in enumerate(shape.full):
            share = whole if axis == 0 else whole / 4
            for width in {1, full // 2}:
                at = (*shape.full[:axis], width, *shape.full[axis + 1 :])
                points[at] = whole - share * (1 - width / full)
        shapes.append(
            SiteTimes(tuple(k.value for k in shape.kinds), shape.full, tuple(s.name for s in shape.sites), points)
        )
    return LatencyTable(dense, rest, tuple(shapes))


def a_search(path: SolutionPath, table: LatencyTable) -> Search:
    losses = Losses(dict.fromkeys(ASKED.kinds or (), LossCurve((0.0, 1.0), (1.0, 100.0))))
    return Search(path, table, losses, Place(), ("head", "qk", "vo", "neuron"), 8, params_lost)


def params_lost(plan: PrunePlan) -> float:
    assert plan.achieved is not None
    return -float(plan.achieved.params)


def some_options(seed: int, sites: int = 4) -> list[Options]:
    generator = np.random.default_rng(seed)
    made = []
    for site in range(sites):
        ms = np.sort(generator.uniform(0, 3, 5))
        losses = np.sort(generator.uniform(0, 5, 5))[::-1]
        made.append(Options(f"s{site}", (UnitKind.NEURON,), np.arange(5)[:, None], ms, losses))
    return made


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_loses_no_more_than_the_best_of_all_combinations(seed: int) -> None:
    options = some_options(seed)
    limit = 0.5 * sum(float(o.ms[-1]) for o in options)
    chosen = choose(options, limit)
    assert chosen is not None
    loss = sum(float(o.losses[i]) for o, i in zip(options, chosen, strict=True))
    assert sum(float(o.ms[i]) for o, i in zip(options, chosen, strict=True)) <= limit
    best = min(
        sum(float(o.losses[i]) for o, i in zip(options, picks, strict=True))
        for picks in itertools.product(*(range(5) for _ in options))
        if sum(float(o.ms[i]) for o, i in zip(options, picks, strict=True)) <= limit * (1 - 1e-3)
    )
    assert loss <= best + 1e-9


def test_a_limit_below_the_fastest_choice_is_out_of_reach_and_one_above_the_slowest_keeps_all() -> None:
    options = some_options(0)
    fastest = sum(float(o.ms[0]) for o in options)
    assert choose(options, fastest - 1e-6) is None
    assert choose(options, fastest) == [0] * 4
    assert choose(options, 100.0) == [4] * 4


def test_options_are_aligned_and_none_is_beaten_by_another(path: SolutionPath) -> None:
    for own in options_of(path, a_table(path), EVEN, kinds=None, align=8):
        assert (np.diff(own.ms) >= 0).all() and (np.diff(own.losses) < 0).all()
        assert own.losses[-1] == 0.0 and not own.widths[0].any()  # whole and gone
        for column, kind in enumerate(own.kinds):
            if kind is not UnitKind.HEAD:
                assert (own.widths[:, column] % 8 == 0).all()


def test_kinds_that_were_not_asked_for_stay_whole(path: SolutionPath) -> None:
    for own in options_of(path, a_table(path), EVEN, kinds=["neuron"], align=8):
        if own.kinds[0] is UnitKind.HEAD:
            assert len(own.ms) == 1 and own.losses[0] == 0.0


def test_a_plan_within_a_limit_is_valid_and_nests_with_others_at_every_site(path: SolutionPath) -> None:
    table = a_table(path)
    search = a_search(path, table)
    plans = [plan_within(search, search.options(), ASKED, limit) for limit in (8.0, 6.0, 4.0)]
    for plan, limit in zip(plans, (8.0, 6.0, 4.0), strict=True):
        plan.validate_for(path.sites)
        assert table.plan_ms(plan.counts(path.sites)) <= limit
        assert plan.achieved is not None and plan.achieved.params < path.costs.params
    for a, b in itertools.combinations(plans, 2):
        for site in path.sites:
            for kind in site.counts:
                if kind in (UnitKind.HEAD, UnitKind.NEURON):
                    one, other = set(a.kept(site, kind)), set(b.kept(site, kind))
                    assert one <= other or other <= one


def test_a_plan_of_counts_is_the_paths_own_plan_at_these_counts(path: SolutionPath) -> None:
    own = path.plan(0.4, align=8)
    assert path.plan_keeping(own.counts(path.sites), ASKED).keep == own.keep


def test_out_of_reach_says_the_best_and_what_cannot_shrink(path: SolutionPath) -> None:
    search = a_search(path, a_table(path))
    with pytest.raises(BudgetError) as refused:
        plan_within(search, search.options(), ASKED, 1.5)
    text = str(refused.value)
    assert "best reachable: 2.000 ms, 5.00 times" in text
    assert "2.000 of the dense model's 10.000 ms lie outside the sites" in text


@pytest.mark.parametrize(("budget", "value"), [("latency", 10.0), ("latency", 12.0), ("speedup", 1.0)])
def test_a_target_that_the_dense_model_meets_is_refused(budget: Any, value: float) -> None:
    with pytest.raises(UsageError, match="dense model meets"):
        limit_of(budget, value, 10.0)
    assert limit_of("latency", 4.0, 10.0) == 4.0
    assert limit_of("speedup", 2.0, 10.0) == 5.0


@pytest.mark.parametrize("kind", ["head", "qk", "vo", "neuron"])
def test_losses_of_a_kind_are_given_back_for_the_paths_own_plans_of_it(kind: str, path: SolutionPath) -> None:
    dear = {"head": 1.0, "qk": 7.0, "vo": 3.0, "neuron": 0.2}

    def loss(plan: PrunePlan) -> float:
        assert plan.achieved is not None and plan.asked is not None and plan.asked.kinds is not None
        return dear[plan.asked.kinds[0]] * plan.achieved.sparsity**3

    losses = measured_losses(path, loss)
    for sparsity in (0.4, 0.6):
        plan = path.plan(sparsity, kinds=[kind])
        counts = plan.counts(path.sites)
        total = 0.0
        for site in path.sites:
            kinds = [site.vanishing_kind, *(k for k in site.counts if k is not site.vanishing_kind)]
            row = np.array([[counts[site.name][each] for each in kinds]])
            total += float(site_losses(path, site, row, kinds, losses)[0])
        assert total == pytest.approx(loss(plan), rel=0.5)


def test_a_density_never_falls_and_nothing_leaves_for_free(path: SolutionPath) -> None:
    made = iter([0.5, 0.4, 0.6, 0.6])
    curve = loss_curve(path, lambda plan: next(made), "neuron")
    assert all(a <= b for a, b in itertools.pairwise(curve.density))
    assert curve.density[0] > 0
    pooled = non_decreasing(np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 2.0]))
    assert pooled == pytest.approx([2.0, 2.0, 2.0])


def test_a_probe_holds_the_asked_widths_and_nothing_else(tiny_vit: nn.Module, path: SolutionPath) -> None:
    attention, neurons = shapes_of(path.sites, path.costs, 8)
    assert [len(shape.sites) for shape in (attention, neurons)] == [2, 2]
    held = at_widths(attention, (2, 8, 16))
    plan = probe_plan(path.sites, held)
    plan.validate_for(path.sites)
    assert all(plan.vanishes(site) for site in neurons.sites)
    cut = probe(tiny_vit, path.sites, held)
    assert cut.blocks[0].attn.num_heads == 2
    assert sum(p.numel() for p in cut.parameters()) == path.costs.params_of(path.sites, plan.counts(path.sites))


class Clockwork(Place):
    """A place where a graph takes 2 ms and a nanosecond for every byte of it; `drift` slows those named so alone."""

    drift, slow = 1.0, ": "  # members are named `target: way`

    def settled(self, onnx: Path) -> Place:
        return self

    def facts(self, onnx: Path) -> dict[str, Any]:
        return {"runtime": "clockwork", "batch": 1}

    def time(self, files: Any, **options: Any) -> LatencyReport:
        return time_of(files, lambda name, file: int(file.read_text()) * (self.drift if self.slow in name else 1.0))


def size_as_time(model: nn.Module, file: Path) -> None:
    file.write_text(str(200_000 + 40 * sum(p.numel() for p in model.parameters())))


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> Clockwork:
    monkeypatch.setattr("deploy_prune.latency.measure._key", lambda *parts: "key.json")
    return Clockwork()


def test_a_table_predicts_whole_plans_where_time_is_size(tiny_vit, path, clockwork, tmp_path: Path) -> None:
    table = latency_table(tiny_vit, path.sites, path.costs, clockwork, size_as_time, cache=tmp_path)
    assert table.factor == pytest.approx(1.0, abs=1e-3)
    for sparsity in (0.2, 0.5, 0.7):
        counts = path.plan(sparsity, align=8).counts(path.sites)
        exact = (200_000 + 40 * path.costs.params_of(path.sites, counts)) / 1e6
        assert table.plan_ms(counts) == pytest.approx(exact, rel=0.02)
    assert all(abs(miss) < 0.05 for shape in table.shapes for miss in shape.misses().values())


def test_a_table_is_measured_once_and_again_when_its_file_is_damaged(tiny_vit, path, clockwork, tmp_path: Path) -> None:
    calls: list[Path] = []

    def export(model: nn.Module, file: Path) -> None:
        calls.append(file)
        size_as_time(model, file)

    def measured() -> LatencyTable:
        return latency_table(tiny_vit, path.sites, path.costs, clockwork, export, cache=tmp_path)

    first = measured()
    made = len(calls)
    assert measured() == replace(first, facts=dict(first.facts)) and len(calls) == made + 1  # dense alone
    (tmp_path / "key.json").write_text("{}")
    measured()
    assert len(calls) == 2 * made + 1


def test_a_machine_slower_than_its_table_is_corrected_once(tiny_vit, path, clockwork, monkeypatch) -> None:
    table = latency_table(tiny_vit, path.sites, path.costs, clockwork, size_as_time)
    search = replace(a_search(path, table), place=clockwork)
    _, fits = fit_plans(search, {"x": ("speedup", 1.5)}, tiny_vit, size_as_time)
    assert fits["x"].met and not fits["x"].corrected
    monkeypatch.setattr(Clockwork, "drift", 1.1)
    _, fits = fit_plans(search, {"x": ("speedup", 1.5)}, tiny_vit, size_as_time)
    fit = fits["x"]
    assert fit.corrected and fit.met
    assert fit.measured == pytest.approx(fit.predicted, rel=0.02)
    assert fit.measured == pytest.approx(1.1 * fit.uncorrected, rel=0.02)
    assert json.loads(json.dumps(fit.to_json()))["met"] is True


def test_the_paths_own_plan_and_the_one_by_the_table_are_measured(path: SolutionPath) -> None:
    search = a_search(path, a_table(path))
    found = search.finalists(ASKED, 6.0)
    assert list(found) == [Way.TABLE, Way.PATH]
    assert all(search.table.plan_ms(plan.counts(path.sites)) <= 6.0 for plan in found.values())
    assert found[Way.PATH].keep != found[Way.TABLE].keep


def test_milliseconds_are_kept_on_a_machine_that_has_become_slower(tiny_vit, path, clockwork, monkeypatch) -> None:
    table = latency_table(tiny_vit, path.sites, path.costs, clockwork, size_as_time)
    monkeypatch.setattr(Clockwork, "drift", 1.13)
    monkeypatch.setattr(Clockwork, "slow", "")  # all, the dense model too
    search = replace(a_search(path, table), place=clockwork)
    _, fits = fit_plans(search, {"x": ("latency", table.dense_ms / 1.5)}, tiny_vit, size_as_time)
    assert fits["x"].corrected and fits["x"].met
    _, fits = fit_plans(search, {"x": ("speedup", 1.5)}, tiny_vit, size_as_time)
    assert fits["x"].met and not fits["x"].corrected


def test_what_is_out_of_reach_as_measured_says_what_is_and_what_was_measured(
    tiny_vit, path, clockwork, monkeypatch
) -> None:
    table = latency_table(tiny_vit, path.sites, path.costs, clockwork, size_as_time)
    search = replace(a_search(path, table), place=clockwork)
    fastest = table.rest_ms + fastest_ms(search.options())
    target = {"x": ("speedup", 0.995 * table.dense_ms / fastest)}
    monkeypatch.setattr(Clockwork, "drift", 1.025)
    _, fits = fit_plans(search, target, tiny_vit, size_as_time)
    assert fits["x"].met and not fits["x"].corrected  # there is none faster, and it is near enough
    monkeypatch.setattr(Clockwork, "drift", 1.3)
    with pytest.raises(BudgetError, match=r"best reachable.*") as error:
        fit_plans(search, target, tiny_vit, size_as_time)
    assert "ms measured" in str(error.value) and "as measured" in str(error.value)


@pytest.mark.parametrize("taken", list(Way))
def test_a_way_is_corrected_by_what_was_measured_of_it_alone(taken, tiny_vit, path, clockwork, monkeypatch) -> None:
    table = latency_table(tiny_vit, path.sites, path.costs, clockwork, size_as_time)
    search = replace(a_search(path, table), place=clockwork)
    monkeypatch.setattr(Search, "finalists", only(taken))
    monkeypatch.setattr(Clockwork, "drift", 1.1)
    monkeypatch.setattr(Clockwork, "slow", "table")
    _, fits = fit_plans(search, {"x": ("speedup", 1.5)}, tiny_vit, size_as_time)
    fit = fits["x"]
    assert fit.met and fit.measured == pytest.approx(fit.predicted, rel=0.02)
    assert (fit.corrected, fit.chosen_by) == (taken is Way.TABLE, str(taken))


def only(way: Way) -> Any:
    whole = Search.finalists
    return lambda self, asked, limit: {w: plan for w, plan in whole(self, asked, limit).items() if w is way}


def test_a_plan_measured_past_the_limit_is_not_taken_for_losing_less(tiny_vit, path, clockwork, monkeypatch) -> None:
    """The path's own plan, found fast once, is allowed to be larger, and is found slow as often as it is corrected."""
    table = latency_table(tiny_vit, path.sites, path.costs, clockwork, size_as_time)
    search = replace(a_search(path, table), place=clockwork)
    drifts = iter([0.85, 1.0, 1.05])

    def time(self: Clockwork, files: Any, **options: Any) -> LatencyReport:
        drift = next(drifts)
        return time_of(files, lambda name, file: int(file.read_text()) * (drift if name.endswith("path") else 1.0))

    monkeypatch.setattr(Clockwork, "time", time)
    _, fits = fit_plans(search, {"x": ("speedup", 1.5)}, tiny_vit, size_as_time)
    assert fits["x"].chosen_by == "table" and fits["x"].met and not fits["x"].corrected
    assert next(drifts, None) is None  # the path's was corrected twice
    monkeypatch.setattr(Search, "finalists", only(Way.PATH))
    drifts = iter([0.85, 1.0, 1.0])
    _, fits = fit_plans(search, {"x": ("speedup", 1.5)}, tiny_vit, size_as_time)
    fit = fits["x"]
    assert fit.chosen_by == "path" and fit.met and fit.corrected
    assert fit.predicted == pytest.approx(fit.measured, rel=0.02) == fit.uncorrected


def test_where_no_plan_is_measured_within_the_limit_the_nearest_is_taken(
    tiny_vit, path, clockwork, monkeypatch
) -> None:
    table = latency_table(tiny_vit, path.sites, path.costs, clockwork, size_as_time)
    search = replace(a_search(path, table), place=clockwork)
    drifts = iter([1.08, 1.2, 1.4])

    def time(self: Clockwork, files: Any, **options: Any) -> LatencyReport:
        drift = next(drifts)
        return time_of(files, lambda name, file: int(file.read_text()) * (drift if ": " in name else 1.0))

    monkeypatch.setattr(Clockwork, "time", time)
    _, fits = fit_plans(search, {"x": ("speedup", 1.5)}, tiny_vit, size_as_time)
    assert not fits["x"].met and not fits["x"].corrected
    assert fits["x"].measured == pytest.approx(1.08 * fits["x"].uncorrected)


def test_counts_of_a_choice_name_every_site(path: SolutionPath) -> None:
    search = a_search(path, a_table(path))
    options = search.options()
    counts = counts_of(options, [0] * len(options))
    assert set(counts) == {site.name for site in path.sites}
    assert fitting.CLOSE < fitting.TAKEN
