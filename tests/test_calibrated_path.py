"""Units of unlike kinds leave in order of measured losses; inside a kind, as the search said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from forms import image_signature, random_path
from processes import run_processes
from torch import nn

import deploy_prune as dp
from deploy_prune.cli.main import run_command
from deploy_prune.errors import BudgetError, PlanError, RecipeError, UnavailableError, UsageError
from deploy_prune.kind_losses import CALIBRATED, LossCurve, Losses, calibrated_path, loss_curve, measured_losses
from deploy_prune.path import SolutionPath
from deploy_prune.pipeline.checks import check_path
from deploy_prune.pipeline.dry import dry_run
from deploy_prune.plan import PrunePlan
from deploy_prune.recipe import Recipe, recipe_from
from deploy_prune.release.manifest import Manifest
from deploy_prune.units import groups, unit_key

KINDS = ("head", "qk", "vo", "neuron")
QUICK_RUN = (
    "model=python:deploy_prune.demo:digits_vit_untrained",
    "search.method=magnitude",
    "search.options={}",
    "search.calibrate=true",
    "search.loss_examples=32",
    "refit.examples=64",
    "quality.limit=50",
    "bench.enabled=false",
    "family.sparsities=[0.3]",
)


@pytest.fixture
def path(tiny_vit: nn.Module) -> SolutionPath:
    return random_path(tiny_vit, image_signature())


def curves(**density: float) -> Losses:
    return Losses({kind: LossCurve((0.1, 0.9), (density.get(kind, 1.0), 4 * density.get(kind, 1.0))) for kind in KINDS})


def test_a_dear_kind_stays_and_the_order_inside_every_kind_is_kept(path: SolutionPath) -> None:
    found = calibrated_path(path, curves(neuron=1e6))
    plan = found.plan(0.2)
    for site, kind in groups(path.sites):
        key = unit_key(site.name, kind)
        before, after = np.asarray(path.scores[key]), np.asarray(found.scores[key])
        assert (np.argsort(before, kind="stable") == np.argsort(after, kind="stable")).all()
        assert ((after > 0) & (after <= 1)).all()
        if kind.value == "neuron":
            assert len(plan.keep[site.name][kind]) == site.units(kind)
    assert plan.achieved is not None and plan.achieved.sparsity >= 0.2
    assert found.plan(0.5).is_nested_in(plan)
    assert found.options["allocation"] == "global" and set(found.options[CALIBRATED]) == set(KINDS)


def test_units_of_equal_losses_leave_in_the_order_of_their_scores(path: SolutionPath) -> None:
    flat = Losses({kind: LossCurve((0.2, 0.8), (1.0, 1.0)) for kind in KINDS})
    found = calibrated_path(path, flat)
    for sparsity in (0.2, 0.5):
        assert found.plan(sparsity).keep == path.plan(sparsity).keep


def test_losses_rise_beyond_the_knots_on_either_side() -> None:
    curve = LossCurve((0.2, 0.6), (1.0, 100.0))
    assert curve.at(np.array([0.0, 0.2, 0.4, 0.6, 0.8])) == pytest.approx([0.1, 1.0, 10.0, 100.0, 1000.0])


def test_a_kind_that_no_plan_reaches_is_as_dear_as_the_dearest(path: SolutionPath) -> None:
    def loss(plan: PrunePlan) -> float:
        assert plan.asked is not None and plan.asked.kinds is not None and plan.achieved is not None
        if plan.asked.kinds[0] in unreached:
            raise BudgetError("out of reach")
        return plan.achieved.sparsity**2

    unreached = {"qk"}
    losses = measured_losses(path, loss)
    dearest = max(losses.curves[kind].density[-1] for kind in KINDS if kind != "qk")
    assert losses.curves["qk"].density == (dearest,)
    unreached |= set(KINDS)
    with pytest.raises(BudgetError, match="out of reach"):
        measured_losses(path, loss)


def test_knots_of_a_kind_that_leaves_late_lie_among_its_own_scores(path: SolutionPath) -> None:
    def loss(plan: PrunePlan) -> float:
        assert plan.achieved is not None
        return plan.achieved.sparsity

    late = {key: 0.6 + 0.4 * scores if key.endswith("neuron") else scores for key, scores in path.scores.items()}
    curve = loss_curve(replace(path, scores=late), loss, "neuron")
    assert min(curve.scores) > 0.6
    near = LossCurve((0.5, 0.501), (1.0, 100.0)).at(np.array([0.0, 1.0]))
    assert near == pytest.approx([1e-3, 1e5])  # not beyond all measure


def test_what_cannot_be_calibrated_is_refused_first(tiny_vit: nn.Module, path: SolutionPath, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no examples"):
        dp.calibrate_path(tiny_vit, None, path, examples=0)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="path to calibrate"):
        dp.calibrate_path(tiny_vit, None, replace(path, weights_sha256="0" * 64))  # type: ignore[arg-type]
    recipe = {
        "name": "r",
        "model": "python:deploy_prune.demo:digits_vit_untrained",
        "task": {"name": "image-classification", "calibration": "digits:train"},
        "family": {"sparsities": [0.3]},
        "search": {"calibrate": True},
    }
    with pytest.raises(UsageError, match="not calibrated"):
        check_path(recipe_from(recipe), path)
    check_path(recipe_from(recipe), calibrated_path(path, curves()))
    assert any("calibrated path" in stage for stage in dry_run(recipe_from(recipe), tmp_path / "out").stages)
    with pytest.raises(RecipeError, match="allocation: global"):
        recipe_from({**recipe, "search": {"calibrate": True, "allocation": "uniform"}})
    asked = [
        "-q",
        "search",
        "timm:x",
        "--task",
        "t",
        "--data",
        "d",
        "--calibrate",
        "--shard",
        "-o",
        str(tmp_path / "p"),
    ]
    assert run_command(asked) == 2


def test_a_search_calibrated_at_the_command_line_is_that_of_python_and_cuts_members(tmp_path: Path) -> None:
    model = "python:deploy_prune.demo:digits_vit_untrained"
    asked = [
        *("search", model, "--task", "image-classification", "--data", "digits:train", "--eval", "digits:test"),
        *("--method", "magnitude", "--examples", "64"),
    ]
    plain, ours = tmp_path / "plain.safetensors", tmp_path / "ours.safetensors"
    assert run_command(["-q", *asked, "-o", str(plain)]) == 0
    assert run_command(["-q", *asked, "--calibrate", "-o", str(ours)]) == 0
    found = SolutionPath.load(ours)
    assert set(found.options[CALIBRATED]) == {kind.value for _, kind in groups(found.sites)}
    loaded = dp.load_model(model)
    task = dp.load_task("image-classification", model=loaded, model_ref=model, calibration="digits:train")
    searched = SolutionPath.load(plain)
    moments = dp.collect_moments(
        loaded, searched.sites, task.calibration(32, 1024), task.signature, losses=task.calibration_losses()
    )
    again = dp.calibrate_path(loaded, task, searched, moments=moments)
    for key, scores in again.scores.items():
        assert scores == pytest.approx(found.scores[key])
    out = tmp_path / "out"
    few = ["--sparsity", ".3", "--no-bench", "--set", "refit.examples=64", "--set", "quality.limit=50", "-o", str(out)]
    assert run_command(["-q", "export", str(ours), *few]) == 0
    assert (out / "path.safetensors").read_bytes() == ours.read_bytes()


def test_a_run_calibrates_the_path_it_searched_and_keeps_the_search(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [part for change in QUICK_RUN for part in ("--set", change)]
    assert run_command(["-q", "run", "digits", *words, "--out", str(out)]) == 0
    path = SolutionPath.load(out / "path.safetensors")
    assert len(path.options[CALIBRATED]["neuron"]["measured"]) == 4
    member = Manifest.load(out / "manifest.json").members[1]
    assert PrunePlan.load(out / str(member.plan)).keep == path.plan(0.3).keep
    assert run_command(["-q", "verify", str(out)]) == 0


def test_a_search_that_is_none_is_refused_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("search", "python:deploy_prune.demo:digits_vit_untrained", "--task", "image-classification")
    asked = [*model, "--data", "digits:train", "--method", "plan", "-o", str(tmp_path / "p")]
    assert run_command(asked) == 2
    assert "unknown method 'plan'" in capsys.readouterr().err


def test_what_was_searched_is_kept_where_only_its_calibration_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deploy_prune.pipeline import run
    from deploy_prune.recipe import load_recipe

    def start(*changes: str) -> list[str]:
        said: list[str] = []
        run.run_recipe(load_recipe("digits", [*QUICK_RUN, *changes]), out, mode="resume", note=said.append)
        return said

    def broken(*_: object) -> None:
        raise UnavailableError("the power is gone")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(run, "dense_stage", broken)
        for changes in ((), ("search.loss_examples=16",), ("search.calibrate=false",)):
            with pytest.raises(UnavailableError, match="power"):
                start(*changes)
    said = start("search.calibrate=false", "refit.enabled=false")
    assert "path: whole from an earlier run" in said
    assert CALIBRATED not in SolutionPath.load(out / "path.safetensors").options


def test_spp_calibrates_where_one_process_holds_the_model_and_a_run_tells_the_two_apart() -> None:
    from deploy_prune.pipeline.losses import calibrates, why_not
    from deploy_prune.pipeline.run import run_fingerprint
    from deploy_prune.pipeline.setup import prepare
    from deploy_prune.recipe import load_recipe

    def of(*changes: str) -> Recipe:
        return load_recipe("digits", [QUICK_RUN[0], *changes])

    assert calibrates(of()) and not calibrates(of("search.calibrate=false"))
    assert not calibrates(of("search.method=fisher")) and calibrates(
        of("search.method=fisher", "search.calibrate=true")
    )
    for change, word in {"search.allocation=uniform": "uniform", "compute.shard=true": "processes"}.items():
        assert not calibrates(of(change)) and word in why_not(of(change))
    assert calibrates(of("compute.shard=true", "search.calibrate=true"))
    setup = prepare(of())
    assert run_fingerprint(setup, None) != run_fingerprint(replace(setup, recipe=of("compute.shard=true")), None)
    assert run_fingerprint(setup, None) == run_fingerprint(replace(setup, recipe=of("compute.micro_batch=2")), None)


def test_a_run_that_leaves_calibration_out_says_why(tmp_path: Path) -> None:
    from deploy_prune.pipeline.run import run_recipe
    from deploy_prune.recipe import load_recipe

    said: list[str] = []
    changes = ["search.method=spp", "search.calibrate=null", "search.allocation=uniform", "search.examples=32"]
    run_recipe(load_recipe("digits", [*QUICK_RUN, *changes]), tmp_path / "out", note=said.append)
    assert "the path is not calibrated: sites share the cut by allocation uniform" in said


def test_a_path_is_calibrated_without_a_refit_too(tmp_path: Path) -> None:
    from deploy_prune.pipeline.run import run_recipe
    from deploy_prune.recipe import load_recipe

    out = tmp_path / "out"
    run_recipe(load_recipe("digits", [*QUICK_RUN, "refit.enabled=false"]), out)
    assert len(SolutionPath.load(out / "path.safetensors").options[CALIBRATED]["neuron"]["measured"]) == 4


def calibrated_here(out: str) -> tuple[dict[str, np.ndarray], list[float]]:
    from deploy_prune.pipeline.run import run_recipe
    from deploy_prune.recipe import load_recipe

    run_recipe(load_recipe("digits", list(QUICK_RUN)), Path(out))
    path = SolutionPath.load(Path(out) / "path.safetensors")
    losses = [loss for kind in KINDS for _, loss in path.options[CALIBRATED][kind]["measured"]]
    return dict(path.scores), losses


def test_two_processes_calibrate_as_one(tmp_path: Path) -> None:
    first, second = run_processes(2, calibrated_here, tmp_path, str(tmp_path / "two"))
    _, losses = calibrated_here(str(tmp_path / "one"))
    assert all((scores == second[0][key]).all() for key, scores in first[0].items())
    assert max(losses) > 1e-6
    assert first[1] == second[1] == pytest.approx(losses, rel=1e-2, abs=1e-7)  # 1e-7: float32's rounding
