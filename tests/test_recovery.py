"""Recovery makes a cut model better, never worse, the same way each time, and goes on where it was stopped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stopping import StopAt
from torch import nn

import deploy_prune as dp
from deploy_prune.architecture import weights_sha256
from deploy_prune.data import Examples
from deploy_prune.demo import digits_vit
from deploy_prune.errors import DataError, RecoveryError, UnavailableError, UsageError
from deploy_prune.methods.compute import Compute
from deploy_prune.recovery import Recovered, recover
from deploy_prune.recovery.state import Mark
from deploy_prune.recovery.training import Training
from deploy_prune.saved_state import SavedState
from deploy_prune.tasks import Task, load_task

Save = Callable[[nn.Module], Path]
SHORT: dict[str, Any] = {"examples": 200, "steps": 12, "evaluations": 3, "batch_size": 16, "precision": "fp32"}


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return digits_vit(epochs=2)


@pytest.fixture(scope="module")
def task(dense: nn.Module) -> Task:
    return load_task(
        "image-classification",
        model=dense,
        model_ref="python:deploy_prune.demo:digits_vit",
        calibration="digits:train",
        evaluation="digits:test",
    )


@pytest.fixture(scope="module")
def small(dense: nn.Module, task: Task) -> nn.Module:
    return dp.compact(dense, dp.search(dense, task, "magnitude").plan(0.6))


def quality(model: nn.Module, task: Task) -> float:
    return task.evaluate(lambda inputs: task.signature.call(model, inputs)).value


def short(model: nn.Module, task: Task, teacher: nn.Module | None, **options: Any) -> Recovered:
    return recover(model, task, teacher=teacher, **{**SHORT, **options})


def test_a_cut_model_gets_better_on_data_that_no_step_saw(dense: nn.Module, small: nn.Module, task: Task) -> None:
    found = recover(small, task, teacher=dense, steps=60, precision="fp32")
    assert found.after > found.before + 0.05
    assert quality(found.model, task) > quality(small, task) + 0.05
    assert (found.held_out, found.trained_on) == (135, task.calibration_size - 135)
    assert found.to_json()["best_step"] == found.best_step > 0


def test_the_given_models_and_random_numbers_stay_as_they_were(dense: nn.Module, small: nn.Module, task: Task) -> None:
    before = weights_sha256(small), weights_sha256(dense), torch.get_rng_state()
    flags = [p.requires_grad for p in small.parameters()]
    model = short(small, task, dense).model
    assert (weights_sha256(small), weights_sha256(dense)) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not model.training and all(p.grad is None for p in model.parameters())
    hooks = [m for given in (small, dense, model) for m in given.modules() if m._forward_hooks or "forward" in vars(m)]
    assert not hooks


def test_the_seed_decides_and_nothing_else(dense: nn.Module, small: nn.Module, task: Task) -> None:
    options = {"drop_path": 0.2, "mixup": 0.5, "cutmix": 0.5, "label_smoothing": 0.1, "ema": 0.9}
    first = short(small, task, dense, **options)
    torch.manual_seed(99)
    assert weights_sha256(short(small, task, dense, **options).model) == weights_sha256(first.model)
    assert weights_sha256(short(small, task, dense, seed=1, **options).model) != weights_sha256(first.model)


def test_when_no_step_helps_the_start_is_returned_and_patience_ends_the_run(
    dense: nn.Module, small: nn.Module, task: Task
) -> None:
    found = short(small, task, dense, steps=60, evaluations=20, lr=0.5, warmup=0.0, patience=2)
    assert found.best_step == 0 and found.after == found.before
    assert found.steps == 6 and len(found.marks) == 3
    assert weights_sha256(found.model) == weights_sha256(small)


def test_the_best_weights_are_kept_not_the_last(
    dense: nn.Module, small: nn.Module, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def mark(training: Training) -> Mark:
        step = training.standing.step
        seen[step] = {name: p.detach().clone() for name, p in training.parameters.items()}
        return Mark(step, {0: 0.5, 2: 0.8, 4: 0.9, 6: 0.7}[step], 1.0)

    monkeypatch.setattr(Training, "_mark", mark)
    found = short(small, task, dense, steps=6)
    assert (found.before, found.after, found.best_step, found.steps) == (0.5, 0.9, 4, 6)
    assert all(torch.equal(p, seen[4][name]) for name, p in found.model.named_parameters())
    assert any(not torch.equal(p, seen[6][name]) for name, p in found.model.named_parameters())


def test_a_loss_that_is_not_finite_stops_with_the_step(dense: nn.Module, small: nn.Module, task: Task) -> None:
    with pytest.raises(RecoveryError, match="not finite at step 2"):
        short(small, task, dense, lr=1e30, warmup=0.0)


def differing(given: nn.Module, found: nn.Module) -> int:
    return sum(int((a != b).sum()) for a, b in zip(given.parameters(), found.parameters(), strict=True))


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_sparse_delta_changes_its_share_of_the_weights_and_no_other(
    dense: nn.Module, small: nn.Module, task: Task, ema: float | None
) -> None:
    options = {"method": "diff", "share": 0.02, "steps": 30, "evaluations": 6, "ema": ema}
    found = short(small, task, dense, **options)
    total = sum(p.numel() for p in small.parameters())
    assert found.changed == differing(small, found.model)
    assert 0 < found.changed <= round(0.02 * total)
    assert found.best_step > 15, "before that the delta is not sparse, and the start is no better"
    assert found.after >= found.before
    assert found.to_json()["changed"] == found.changed
    delta = dp.TaskDelta.between(small, found.model)
    assert weights_sha256(delta.apply(copy.deepcopy(small))) == weights_sha256(found.model)


def test_a_sparse_delta_makes_a_cut_model_better(dense: nn.Module, small: nn.Module, task: Task) -> None:
    found = recover(small, task, teacher=dense, steps=80, precision="fp32", method="diff", share=0.05)
    assert found.after > found.before + 0.1
    assert quality(found.model, task) > quality(small, task) + 0.1


def test_while_it_is_found_what_changes_most_weights_stay_exactly(
    dense: nn.Module, small: nn.Module, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = {}

    def mark(training: Training) -> Mark:
        pairs = zip(small.parameters(), training.parameters.values(), strict=True)
        moved[training.standing.step] = sum(int((a != b).sum()) for a, b in pairs)
        return Mark(training.standing.step, 0.5, 1.0)

    monkeypatch.setattr(Training, "_mark", mark)
    short(small, task, dense, steps=12, evaluations=12, method="diff", share=0.01)
    total = sum(p.numel() for p in small.parameters())
    assert moved[0] == 0 < moved[6] < 0.9 * total
    assert 0 < moved[7] <= round(0.01 * total)


def test_a_dense_candidate_never_wins_however_good(
    dense: nn.Module, small: nn.Module, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {0: 0.5, 2: 0.99, 4: 0.6, 6: 0.55}
    monkeypatch.setattr(Training, "_mark", lambda self: Mark(self.standing.step, values[self.standing.step], 1.0))
    found = short(small, task, dense, steps=6, method="diff", find=0.4, share=0.01)
    assert (found.best_step, found.after) == (4, 0.6)
    assert [mark.step for mark in found.marks] == [0, 2, 4, 6]


def test_what_a_sparse_delta_cannot_be_is_refused(dense: nn.Module, small: nn.Module, task: Task) -> None:
    with pytest.raises(UsageError, match="at least 2"):
        short(small, task, dense, method="diff", steps=1)
    with pytest.raises(UsageError, match="belong to"):
        short(small, task, dense, share=0.1)
    with pytest.raises(UsageError, match="whole weights"):
        short(small, task, dense, method="diff", compute=Compute(shard=True))


@pytest.mark.parametrize("method", ["full", "lora", "diff"])
def test_a_stopped_run_goes_on_to_the_same_bits(
    dense: nn.Module, small: nn.Module, task: Task, tmp_path: Path, method: str
) -> None:
    options: dict[str, Any] = {"drop_path": 0.2, "mixup": 0.5, "ema": 0.9, "method": method, "patience": None}
    whole = short(small, task, dense, **options)
    for stop in (3, 5, 9):  # 4 and 8 are judged; 5 and 9 are after that
        with pytest.raises(KeyboardInterrupt):
            short(small, task, dense, saved=SavedState(tmp_path, minutes=0), progress=StopAt(None, stop), **options)
    resumed = short(small, task, dense, saved=SavedState(tmp_path, minutes=0), **options)
    assert weights_sha256(resumed.model) == weights_sha256(whole.model)
    assert resumed.marks == whole.marks


def test_a_state_of_other_options_is_not_taken_up(
    dense: nn.Module, small: nn.Module, task: Task, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        short(small, task, dense, saved=SavedState(tmp_path, minutes=0), progress=StopAt(None, 9), lr=1e-2)
    found = short(small, task, dense, saved=SavedState(tmp_path, minutes=0))
    assert weights_sha256(found.model) == weights_sha256(short(small, task, dense).model)


@pytest.mark.parametrize("compute", [Compute(micro_batch=5), Compute(activation_checkpointing=True)])
def test_memory_saved_changes_rounding_only(dense: nn.Module, small: nn.Module, task: Task, compute: Compute) -> None:
    whole_only = {"drop_path": 0.2}  # pieces draw their own numbers, and measure hidden states on their own scale
    options = {"hidden_weight": 0.0} if compute.micro_batch else whole_only
    plain = short(small, task, dense, steps=4, **options).marks[-1]
    saving = short(small, task, dense, steps=4, compute=compute, **options).marks[-1]
    assert saving.loss == pytest.approx(plain.loss, rel=1e-3)


def test_adapters_are_merged_and_leave_no_trace(dense: nn.Module, small: nn.Module, task: Task) -> None:
    found = short(small, task, dense, steps=30, method="lora", rank=4, lr=1e-2)
    assert found.best_step > 0
    assert [type(m) for m in found.model.modules()] == [type(m) for m in small.modules()]
    changed = [
        name
        for (name, p), q in zip(found.model.named_parameters(), small.parameters(), strict=True)
        if not torch.equal(p, q)
    ]
    assert changed and all(name.startswith("blocks.") and name.endswith("weight") for name in changed)


def test_merged_adapters_compute_what_they_computed_beside_the_weights(small: nn.Module, task: Task) -> None:
    from deploy_prune.recovery.lora import add_adapters, merge_adapters

    model = copy.deepcopy(small)
    add_adapters(model, ["blocks.0", "blocks.2"], rank=4, alpha=8.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    inputs = next(task.evaluation(8)).inputs
    with torch.no_grad():
        beside = task.signature.call(model, inputs)
        merge_adapters(model)
        torch.testing.assert_close(task.signature.call(model, inputs), beside, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(task.signature.call(small, inputs), beside, atol=1e-2)


def sentences(count: int = 60) -> Examples:
    texts = [" ".join(f"w{(7 * i + j) % 95}" for j in range(1 + (5 * i) % 9)) for i in range(count)]
    return Examples("made", {"text": texts, "label": [i % 2 for i in range(count)]})


@pytest.mark.parametrize("family", ["tiny_bert", "tiny_distilbert", "tiny_llama"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_text_models_are_recovered(family: str, method: str, saved: Save, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(family)
    folder = saved(model)
    how: dict[str, Any] = {"model": model, "model_ref": f"hf:{folder}", "evaluation": None}
    if family == "tiny_llama":
        text = Examples("made", {"text": [" ".join(f"w{(i * i) % 95}" for i in range(600))]})
        task = load_task("causal-lm", calibration=text, length=16, **how)
    else:
        task = load_task("text-classification", calibration=sentences(), **how)
    plan = dp.search(model, task, "magnitude").plan(0.5)
    found = recover(
        dp.compact(model, plan), task, teacher=model, steps=10, evaluations=2, batch_size=8, method=method, lr=1e-2
    )
    assert found.marks[-1].loss < found.marks[0].loss
    assert [type(m) for m in found.model.modules()] == [type(m) for m in dp.compact(model, plan).modules()]


def test_a_site_that_vanished_is_made_up_for_by_the_others(dense: nn.Module, task: Task) -> None:
    from deploy_prune.plan import dense_plan

    plan = dense_plan("digits", weights_sha256(dense), dp.find_sites(dense))
    keep = {site: dict(kinds) for site, kinds in plan.keep.items()}
    keep["blocks.2.mlp"] = {kind: [] for kind in keep["blocks.2.mlp"]}
    keep["blocks.1.attn"] = {kind: [] for kind in keep["blocks.1.attn"]}
    small = dp.compact(dense, plan.model_copy(update={"keep": keep}))
    found = short(small, task, dense, steps=40, lr=2e-3)
    assert found.after > found.before and found.marks[-1].loss < found.marks[0].loss


def test_without_a_teacher_the_labels_teach_and_without_labels_the_teacher(
    dense: nn.Module, small: nn.Module, task: Task
) -> None:
    alone = short(small, task, None, steps=30)
    assert alone.after > alone.before
    examples = task.calibration_data
    unlabeled = load_task(
        "image-classification",
        model=dense,
        model_ref="x",
        calibration=Examples("digits", {"image": examples.column("image")}),
        metric="agreement",
    )
    taught = short(small, unlabeled, dense, steps=30)
    assert taught.metric == "agreement" and taught.after > taught.before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 3, "epochs": 1}, "either `epochs` or `steps`"),
        ({"rank": 4}, "belong to `method: lora`"),
        ({"task_weight": 0, "logits_weight": 0, "hidden_weight": 0}, "above 0"),
        ({"learning_rate": 1e-3}, "unknown key"),
        ({"lr": -1.0, "ema": 1.5}, "2 bad option"),
        ({"method": "qlora"}, "'full', 'lora' or 'diff'"),
        ({"recipe": "imagenet"}, "spp-imagenet"),
        ({"crop": 0.5}, "float arrays cannot be cropped"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    dense: nn.Module, small: nn.Module, task: Task, options: dict[str, Any], words: str
) -> None:
    with pytest.raises((UsageError, DataError), match=words):
        recover(small, task, teacher=dense, **options)


def test_options_of_images_are_refused_for_texts(saved: Save, tiny_distilbert: nn.Module) -> None:
    model = tiny_distilbert
    how: dict[str, Any] = {"model": model, "model_ref": f"hf:{saved(model)}", "calibration": sentences()}
    with pytest.raises(UsageError) as caught:
        recover(model, load_task("text-classification", **how), teacher=model, recipe="spp-imagenet", steps=1)
    named = [problem.partition(":")[0] for problem in caught.value.problems]
    assert named == ["crop", "flip", "randaugment", "erasing", "mixup", "cutmix"]


def test_a_loss_without_what_it_needs_is_refused(dense: nn.Module, small: nn.Module, task: Task) -> None:
    with pytest.raises(UsageError, match="there is no teacher"):
        short(small, task, None, hidden_weight=1.0)
    with pytest.raises(UsageError, match="nothing to minimise"):
        short(small, task, None, task_weight=0.0)


def test_absent_peft_is_told_with_the_way_to_get_it(
    dense: nn.Module, small: nn.Module, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"deploy-prune\[lora\]"):
        short(small, task, dense, method="lora")


def test_too_little_data_to_hold_a_part_out_is_told(dense: nn.Module, small: nn.Module, task: Task) -> None:
    with pytest.raises(DataError, match="hold a part out"):
        short(small, task, dense, examples=50, holdout=50)
