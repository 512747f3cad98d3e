"""Diff pruning finds a sparse difference that learns the task, and nothing of the base moves elsewhere."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from shipped import SIGNATURES, exported
from stopping import StopAt

import deploy_prune as dp
from converters.delta_onnx import task_session, write_task
from deploy_prune.architecture import weights_sha256
from deploy_prune.cli.main import cli
from deploy_prune.delta import TaskDelta, diff
from deploy_prune.delta.fits import Dense, Sparse, at_random, largest, owners_of
from deploy_prune.delta.gated import gated, opened
from deploy_prune.delta.lora import adapters_of
from deploy_prune.delta.phase import Phase
from deploy_prune.delta.training import head_of
from deploy_prune.demo import digits_vit
from deploy_prune.errors import ArtifactError, DataError, UnavailableError, UsageError
from deploy_prune.hard_concrete import DIFF
from deploy_prune.recovery.feed import split
from deploy_prune.recovery.judging import Judge
from deploy_prune.recovery.options import RecoverOptions
from deploy_prune.saved_state import SavedState
from deploy_prune.sources import describe_source

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="needs the extra lora")
LORA = pytest.param("lora", marks=needs_peft)

QUICK: dict[str, Any] = {"epochs": 1, "mask_epochs": 1, "examples": 200, "share": 0.01, "lr": 1e-3, "mask_lr": 1e-3}
REFERENCE = "python:deploy_prune.demo:digits_vit"


@pytest.fixture(scope="module")
def digits():
    """A trained model whose head has been forgotten, and the task."""
    model = digits_vit()
    with torch.no_grad():
        model.head.weight.zero_()
    task = dp.load_task(
        "image-classification", model=model, model_ref="x", calibration="digits:train", evaluation="digits:test"
    )
    return model, task


def test_gates_are_zero_one_or_between_as_often_as_their_formula_says():
    alpha = torch.full((200_000,), 0.3)
    z = DIFF.sampled(alpha, torch.rand(alpha.shape, generator=torch.Generator().manual_seed(0)))
    assert (z > 0).float().mean().item() == pytest.approx(float(DIFF.open_probability(alpha)[0]), abs=0.005)
    assert ((z >= 0) & (z <= 1)).all()
    assert float(DIFF.open_probability(torch.tensor(5.0))) == pytest.approx(1 / (1 + math.exp(-5)))
    assert DIFF.without_noise(torch.tensor([-9.0, 0.0, 9.0])).tolist() == pytest.approx([0, 0, 1], abs=1e-3)


def test_gates_in_pieces_give_the_values_and_gradients_of_their_formulas(monkeypatch):
    monkeypatch.setattr("deploy_prune.delta.gated.PIECE", 64)
    generator = torch.Generator().manual_seed(0)
    alpha = 4 * torch.randn(10, 33, generator=generator)
    alpha[0, :4] = torch.tensor([-200.0, -90.0, 90.0, 200.0])
    w, g = torch.randn(10, 33, generator=generator), torch.randn(10, 33, generator=generator)
    torch.manual_seed(3)
    u = torch.cat([torch.rand(len(piece)) for piece in torch.arange(330).split(64)]).view(10, 33)
    torch.manual_seed(3)
    found = []
    for gates in (lambda w, a: (gated(DIFF, w, a), opened(DIFF, a)),
                  lambda w, a: (DIFF.sampled(a, u) * w, DIFF.open_probability(a).sum())):  # fmt: skip
        own_w, own_alpha = w.clone().requires_grad_(), alpha.clone().requires_grad_()
        values = gates(own_w, own_alpha)
        torch.autograd.backward(values, (g, torch.tensor(0.3)))
        found.append([*values, own_w.grad, own_alpha.grad])
    assert 0 < int((found[0][0] == 0).sum()) < 330 and torch.isfinite(found[0][3]).all()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_weights_in_channels_last_and_without_values_have_gates_too():
    base = {"conv": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), "none": torch.zeros(0, 5)}
    dense = Dense(base, gated=True, alpha=0.5, strength=0.1)
    dense.w["conv"].data.fill_(1.0)
    (sum(t.sum() for t in dense.tensors(training=True).values()) + dense.penalty()).backward()
    gradient = dense.alpha["conv"].grad
    assert gradient is not None and gradient.abs().sum() > 0
    assert dense.penalty().item() == pytest.approx(0.1 * 48 / (1 + math.exp(-0.5)))


def test_the_structured_penalty_is_that_of_the_paper():
    base = {"a": torch.zeros(3, 4), "b": torch.zeros(5)}
    owners = {"a": torch.tensor(0), "b": torch.tensor(1)}
    dense = Dense(base, gated=True, alpha=0.7, strength=0.1, owners=owners)
    dense.group_alpha.data = torch.tensor([1.0, -2.0])
    σ = torch.sigmoid
    wanted = 0.1 * (12 * σ(torch.tensor(0.7)) * σ(torch.tensor(1.0)) + 5 * σ(torch.tensor(0.7)) * σ(torch.tensor(-2.0)))
    torch.testing.assert_close(dense.penalty(), wanted)


def test_the_proximal_step_makes_exact_zeros():
    dense = Dense({"a": torch.zeros(3)}, gated=False, alpha=5.0, strength=0.5)
    dense.w["a"].data = torch.tensor([0.4, -0.04, -0.2])
    dense.shrink(0.1)
    torch.testing.assert_close(dense.w["a"], torch.tensor([0.35, 0.0, -0.15]))
    assert dense.w["a"][1] == 0


def test_the_largest_differences_are_chosen_over_all_tensors():
    chosen = largest({"a": torch.tensor([[0.1, -5.0], [0.0, 0.3]]), "b": torch.tensor([4.0, 0.2])}, 3)
    assert {name: where.tolist() for name, where in chosen.items()} == {"a": [1, 3], "b": [0]}
    assert {n: w.tolist() for n, w in largest({"a": torch.zeros(4)}, 3).items()} == {"a": []}


def test_a_random_choice_has_its_number_and_follows_the_seed():
    base = {"a": torch.zeros(100), "b": torch.zeros(7, 9)}
    one, two = at_random(base, 30, 1), at_random(base, 30, 2)
    assert sum(map(len, one.values())) == 30
    assert not torch.equal(one["a"], two["a"])


def test_a_sparse_difference_moves_only_what_was_chosen():
    base = {"a": torch.randn(4, 5)}
    sparse = Sparse(base, {"a": torch.tensor([3, 17])})
    sparse.values["a"].data += 1
    moved = (sparse.tensors()["a"] != base["a"]).flatten()
    assert moved.nonzero().flatten().tolist() == [3, 17]


def test_units_of_a_site_share_a_group_in_all_its_layers(tiny_bert):
    base = {n: p for n, p in tiny_bert.named_parameters() if not n.startswith("classifier")}
    owners = owners_of(tiny_bert, base, "unit")
    layer = "bert.encoder.layer.0"
    up, down = owners[f"{layer}.intermediate.dense.weight"], owners[f"{layer}.output.dense.weight"]
    assert torch.equal(up.flatten(), down.flatten())
    assert torch.equal(up.flatten(), owners[f"{layer}.intermediate.dense.bias"])
    heads = owners[f"{layer}.attention.self.query.weight"].flatten()
    assert len(heads.unique()) == 4
    assert torch.equal(heads, owners[f"{layer}.attention.self.value.weight"].flatten())
    assert len(owners["bert.embeddings.word_embeddings.weight"].unique()) == 1


@pytest.mark.parametrize("options", [{}, {"groups": "tensor"}, {"groups": "unit"}, {"fit": "l1"}, {"fit": "random"}])
def test_a_fit_learns_the_task_within_its_share_and_comes_back(digits, options):
    model, task = digits
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = diff(model, task, **{**QUICK, **options})
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert found.after > found.before + 0.3
    total = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("head."))
    assert 0 < found.delta.count <= round(0.01 * total)
    made = found.delta.apply(digits_vit())
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), found.model.parameters(), strict=True))
    assert set(found.delta.head) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("fit", ["bitfit", "last-layer", "full", LORA])
def test_the_fits_to_compare_with_change_what_their_name_says(digits, fit):
    model, task = digits
    found = diff(model, task, **{**QUICK, "fit": fit})
    assert found.after > found.before
    assert 0 < found.lora_state_bytes < 0.1 * found.full_state_bytes
    names = set(found.delta.changes)
    if fit == "bitfit":
        assert names
        assert all(name.endswith("bias") for name in names)
    elif fit == "last-layer":
        assert not names
    elif fit == "lora":
        assert all(name.endswith("weight") for name in names)
        assert found.trainable["mask"] < 0.06 * sum(p.numel() for p in model.parameters())


def test_the_same_seed_finds_the_same_delta(digits, tmp_path):
    model, task = digits
    files = []
    for name in ("a", "b"):
        found = diff(model, task, seed=3, **{**QUICK, "examples": 100})
        found.delta.save(tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("fit", ["l0", "l1", LORA])
def test_a_stopped_training_goes_on_to_the_same_delta(digits, fit, tmp_path, monkeypatch):
    model, task = digits
    options = {**QUICK, "examples": 150, "batch_size": 16, "fit": fit}
    whole = diff(model, task, **options)
    saved = SavedState(tmp_path / "work", minutes=0)
    phases = ["diff: mask"] if fit == "lora" else ["diff: find", "diff: mask"]
    taken: list[str] = []
    advance = Phase._advance
    monkeypatch.setattr(Phase, "_advance", lambda self, *a: (taken.append(self.name), advance(self, *a))[1])
    for phase in phases:
        with pytest.raises(KeyboardInterrupt):
            diff(model, task, saved=saved, progress=StopAt(phase, 5), **options)
    resumed = diff(model, task, saved=saved, **options)
    assert resumed.marks == whole.marks
    assert weights_sha256(resumed.model) == weights_sha256(whole.model)
    steps = sum(marks[-1].step for marks in whole.marks.values())
    assert steps < len(taken) <= steps + len(phases), "at most the step that was stopped is taken again"


def test_without_a_second_phase_the_figure_is_of_the_sparse_model(digits):
    model, task = digits
    options = {"fit": "l1", "mask_epochs": 0, "epochs": 1, "examples": 100, "lr": 1e-3, "share": 0.001}
    found = diff(model, task, precision="fp32", **options)  # as the mark below
    held_out = split(task, RecoverOptions(examples=100))[1]
    mark = Judge(task, held_out, None).mark(0, lambda inputs: task.signature.call(found.model, inputs))
    assert found.after == mark.value
    assert found.marks["mask"][0].loss == pytest.approx(mark.loss, rel=1e-5)


@needs_peft
def test_adapters_take_about_as_many_numbers_as_the_delta(tiny_bert):
    adapters = adapters_of(tiny_bert, 5000)
    adapted = adapters.beside(tiny_bert)
    assert adapters.numbers == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert abs(adapters.numbers - 5000) <= adapters.numbers / adapters.rank / 2


def test_bad_requests_are_refused(digits, tiny_bert):
    model, task = digits
    with pytest.raises(UsageError, match="bad option"):
        diff(model, task, shore=0.1)
    with pytest.raises(UsageError, match="belong to"):
        diff(model, task, fit="l1", groups="tensor")
    with pytest.raises(UsageError, match="no such head"):
        diff(model, task, head=("head", "tail"))
    with pytest.raises(UsageError, match="no value to change"):
        diff(model, task, share=1e-7)
    unlabeled = dp.load_task(
        "image-classification", model=model, model_ref="x", calibration=unlabeled_images(), metric="agreement"
    )
    with pytest.raises(DataError, match="labeled"):
        diff(model, unlabeled, **QUICK)
    assert "classifier" in head_of(tiny_bert)


def unlabeled_images():
    from deploy_prune.data import load_data

    data = load_data("digits:train")
    return type(data)(data.reference, {"image": data.column("image")})


def test_one_base_file_serves_a_task_at_load_time(tiny_bert):
    """Initializers are replaced while the session is made: it answers as torch with the delta applied does."""
    import copy

    from converters.parity import check_parity

    path, _ = exported("tiny_bert", tiny_bert)
    task = copy.deepcopy(tiny_bert)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in task.parameters():
            flat = p.view(-1)
            where = torch.randperm(len(flat), generator=generator)[: max(1, len(flat) // 50)]
            flat[where] += torch.randn(len(where), generator=generator) * 0.1
    head = [n for n, _ in task.named_parameters() if n.startswith("classifier")]
    delta = TaskDelta.between(tiny_bert, task, head)
    session = task_session(path, delta)

    def form(inputs):
        return torch.from_numpy(session.run({name: tensor.numpy() for name, tensor in inputs.items()}))

    report = check_parity({"task": task, "onnx": form}, SIGNATURES["tiny_bert"])
    assert report.error < 2e-4
    plain = check_parity({"base": tiny_bert, "onnx": path}, SIGNATURES["tiny_bert"])
    assert plain.error < 2e-4, "the base's file is as it was"


def test_a_file_made_of_the_base_holds_the_very_weights_of_the_tasks_own_export(tiny_bert, tmp_path):
    import copy

    import onnx

    base, _ = exported("tiny_bert", tiny_bert)
    task = copy.deepcopy(tiny_bert)
    with torch.no_grad():
        task.bert.encoder.layer[1].output.dense.weight[3, 5] += 1
        task.bert.embeddings.word_embeddings.weight[7, 2] -= 1
        task.classifier.weight.mul_(2)
    own = tmp_path / "own.onnx"
    dp.export_onnx(task, own, SIGNATURES["tiny_bert"])
    made = tmp_path / "made.onnx"
    write_task(base, TaskDelta.between(tiny_bert, task, ["classifier.weight"]), made)

    def weights(file):
        graph = onnx.load(file).graph
        return {i.name: onnx.numpy_helper.to_array(i).tobytes() for i in graph.initializer}

    assert weights(made) == weights(own)


def test_a_base_with_its_weights_beside_it_is_refused(tiny_bert, tmp_path):
    import onnx

    base, _ = exported("tiny_bert", tiny_bert)
    beside = tmp_path / "beside.onnx"
    onnx.save(onnx.load(base), beside, save_as_external_data=True, location="beside.data", size_threshold=64)
    delta = TaskDelta.between(tiny_bert, tiny_bert)
    with pytest.raises(ArtifactError, match="lie beside its file"):
        task_session(beside, delta)
    with pytest.raises(ArtifactError, match="lie beside its file"):
        write_task(beside, delta, tmp_path / "task.onnx")
    assert not (tmp_path / "task.onnx").exists()


def test_a_delta_on_another_file_is_refused(tiny_bert, tiny_distilbert):
    import copy

    path, _ = exported("tiny_bert", tiny_bert)
    other, task = copy.deepcopy(tiny_bert), copy.deepcopy(tiny_bert)
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight[0, 0] += 1
        task.bert.encoder.layer[0].output.dense.weight[0, 0] += 2
    with pytest.raises(ArtifactError, match="does not fit"):
        task_session(path, TaskDelta.between(other, task))
    distilled, _ = exported("tiny_distilbert", tiny_distilbert)
    with pytest.raises(ArtifactError, match="no such initializer"):
        task_session(distilled, TaskDelta.between(tiny_bert, task))


def test_from_the_command_line_to_onnx(tmp_path):
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli, [*arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    file, data = str(tmp_path / "d.safetensors"), ["--task", "image-classification", "--data", "digits:train"]
    settings = [f"--set={key}={value}" for key, value in QUICK.items() if key != "share"]
    found = json.loads(
        run("-q", "diff", REFERENCE, *data, "--eval", "digits:test", "--share", ".01", *settings, "-o", file, "--json")
    )
    assert found["evaluation"]["task"]["value"] > 0.9
    assert found["file_bytes"] < 0.05 * found["sizes"]["base"]
    assert json.loads(run("-q", "delta", "inspect", file, "--json"))["values changed"] > 0
    onnx, base = str(tmp_path / "task.onnx"), str(tmp_path / "base.onnx")
    exported_task = json.loads(run("-q", "delta", "export", file, "-o", onnx, "--json"))
    assert exported_task["parity"]["error"] < 2e-4
    run("-q", "delta", "export", file, "--base", "-o", base)
    assert json.loads(run("-q", "delta", "export", file, "--onto", base, "--json"))["parity"]["error"] < 2e-4
    assert json.loads(run("-q", "inspect", file, "--json")) == json.loads(run("-q", "delta", "inspect", file, "--json"))
    made = tmp_path / "made.onnx"
    run("-q", "delta", "export", file, "--onto", base, "-o", str(made))
    assert made.stat().st_size > 0
    whole = str(tmp_path / "whole.safetensors")
    run("-q", "delta", "apply", file, "-o", whole)
    assert CliRunner().invoke(cli, ["-q", "delta", "export", file]).exit_code != 0


def test_an_export_that_is_not_equal_leaves_no_file(tmp_path, monkeypatch):
    from converters import parity
    from deploy_prune.errors import ParityError

    def differs(*_, **__):
        raise ParityError("forms differ")

    file = tmp_path / "d.safetensors"
    base = digits_vit()
    how = {"name": "image-classification", "data": "digits:train", "options": {}}
    TaskDelta.between(base, base, facts={"model": REFERENCE, "task": how}).save(file)
    monkeypatch.setattr(parity, "check_parity", differs)
    result = CliRunner().invoke(cli, ["-q", "delta", "export", str(file), "-o", str(tmp_path / "task.onnx")])
    assert isinstance(result.exception, ParityError)
    assert [f.name for f in tmp_path.iterdir()] == ["d.safetensors"]


def test_a_reference_names_a_task_by_its_delta(saved, tiny_bert, tmp_path):
    """So that search, run and export take a task's model as they take any other."""
    folder = saved(tiny_bert)
    base = dp.load_model(f"hf:{folder}")
    task = dp.load_model(f"hf:{folder}")
    with torch.no_grad():
        task.bert.encoder.layer[0].output.dense.weight[0, 0] += 1
        task.classifier.bias.fill_(0.5)
    file = tmp_path / "d.safetensors"
    TaskDelta.between(base, task, ["classifier.bias"]).save(file)
    reference = f"hf:{folder}?delta={file}"
    assert weights_sha256(dp.load_model(reference)) == weights_sha256(task)
    assert describe_source(reference).exists
    assert not describe_source(f"hf:{folder}?delta={file}x").exists
    with pytest.raises(UnavailableError, match="delta file"):
        dp.load_model(f"hf:{folder}?delta={file}x")
    with pytest.raises(ArtifactError, match="not the base model"):
        dp.load_model(f"hf:{folder}?delta={file}&new_head=3&num_hidden_layers=1")


def test_a_new_head_is_the_same_at_every_load(saved, tiny_bert):
    folder = saved(tiny_bert)
    one, two = (dp.load_model(f"hf:{folder}?new_head=5") for _ in range(2))
    assert one.config.num_labels == 5
    assert torch.equal(one.classifier.weight, two.classifier.weight)
    assert torch.equal(
        one.bert.encoder.layer[0].output.dense.weight, tiny_bert.bert.encoder.layer[0].output.dense.weight
    )


@pytest.mark.parametrize("name", ["tiny_swin", "tiny_swinv2", "tiny_gpt2"])
def test_constants_that_a_runtime_folds_are_the_tasks_own(name, request, tmp_path):
    """Position biases and tied embeddings reach the graph through nodes that are folded while a session is made."""
    import copy

    from forms import signature_of

    from converters.onnx_export import export_onnx
    from converters.parity import check_parity

    base, signature = request.getfixturevalue(name), signature_of(name)
    export_onnx(base, tmp_path / "base.onnx", signature)
    task = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in task.parameters():
            p.add_(0.1 * p.abs().mean() * torch.randn(p.shape, generator=generator))
    delta = TaskDelta.between(base, task)
    session = task_session(tmp_path / "base.onnx", delta)

    def form(inputs):
        return torch.from_numpy(session.run({n: t.numpy() for n, t in inputs.items()}))

    assert check_parity({"task": task, "onnx": form}, signature).error < 2e-4


def test_a_choice_that_is_not_trained_is_judged_as_it_is(digits):
    model, task = digits
    found = diff(model, task, head=(), **{**QUICK, "mask_epochs": 0, "share": 1e-4})
    again = diff(found.model, task, head=(), **{**QUICK, "epochs": 1e-3, "mask_epochs": 0, "share": 1e-4})
    assert found.after == again.before, "what is reported is the metric of the model that is given"


@pytest.mark.parametrize("new_head", ["abc", "0", "-1", "2.5", "true"])
def test_a_new_head_needs_a_number_of_classes(saved, tiny_bert, new_head):
    with pytest.raises(UsageError, match="number of classes"):
        dp.load_model(f"hf:{saved(tiny_bert)}?new_head={new_head}")


def test_a_new_head_on_an_encoder_of_other_shapes_is_refused(saved, tiny_bert):
    folder = saved(tiny_bert)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(ArtifactError, match="do not fit"):
        dp.load_model(f"hf:{folder}?new_head=2")
