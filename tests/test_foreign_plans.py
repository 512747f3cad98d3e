"""Decisions of other tools: read as plans, written back, and refused where a plan or a form cannot say them."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from forms import output, random_path, signature_of

from converters.surgery import compact
from deploy_prune.adapters import find_sites
from deploy_prune.architecture import weights_sha256
from deploy_prune.cli.main import run_command
from deploy_prune.errors import ArtifactError, PlanError, UsageError
from deploy_prune.foreign import export_plan, import_plan
from deploy_prune.plan import PrunePlan, dense_plan
from deploy_prune.plan_path import costs_of, given_plan, path_of_plan
from deploy_prune.units import UnitKind, groups


def read(file, model):
    return import_plan(file, find_sites(model), model="tiny", weights_sha256=weights_sha256(model))


def write(tmp_path, data, name="plan.json"):
    (tmp_path / name).write_text(json.dumps(data))
    return tmp_path / name


def pruned_by_torch_pruning(model, signature, ratio, steps=1):
    """(what Torch-Pruning leaves, its history): feed-forwards and head dimensions, ranked by magnitude."""
    tp = pytest.importorskip("torch_pruning")
    from bench.peers.torch_pruning import _num_heads, _others
    from deploy_prune.layers import layer_at

    sites = find_sites(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model.requires_grad_(True),
            signature.random_inputs({"batch": 1, "sequence": 7}, seed=0),
            importance=tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=ratio,
            iterative_steps=steps,
            ignored_layers=[*(layer_at(model, s.out) for s in sites), *_others(model, sites)],
            num_heads=_num_heads(model, sites),
            forward_fn=lambda m, inputs: signature.call(m, inputs),
            output_transform=lambda out: out.sum(),
        )
        for _ in range(steps):
            pruner.step()
    return model, pruner.pruning_history()


@pytest.mark.parametrize(("name", "steps"), [("tiny_distilbert", 1), ("tiny_distilbert", 3), ("tiny_vit", 1)])
def test_history_of_torch_pruning_gives_the_weights_that_it_left(name, steps, request, tmp_path):
    import copy

    from bench.peers.decisions import plan_of

    dense = request.getfixturevalue(name)
    small, history = pruned_by_torch_pruning(copy.deepcopy(dense), signature_of(name), 0.4, steps)
    assert history
    plan = read(write(tmp_path, history), dense)
    expected = plan_of(dense, small, find_sites(dense), "tiny", weights_sha256(dense))
    assert plan.keep == expected.keep
    ours = compact(dense, plan)
    assert {n: tuple(p.shape) for n, p in ours.named_parameters()} == {
        n: tuple(p.shape) for n, p in small.named_parameters()
    }
    for (left, mine), (right, theirs) in zip(ours.named_parameters(), small.named_parameters(), strict=True):
        assert left == right
        assert torch.equal(mine, theirs)


def test_torch_pruning_redoes_a_plan_that_was_written_as_its_history(tiny_distilbert, tmp_path):
    import copy

    tp = pytest.importorskip("torch_pruning")
    path = random_path(tiny_distilbert, signature_of("tiny_distilbert"), seed=3)
    plan = path.plan(0.4, kinds=["neuron"])
    export_plan(plan, path.sites, tmp_path / "history.json", "history")
    theirs = copy.deepcopy(tiny_distilbert).requires_grad_(True)
    signature = signature_of("tiny_distilbert")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(
            theirs,
            signature.random_inputs({"batch": 1, "sequence": 7}, seed=0),
            forward_fn=lambda m, inputs: signature.call(m, inputs),
        )
        graph.load_pruning_history(json.loads((tmp_path / "history.json").read_text()))
    ours = compact(tiny_distilbert, plan)
    torch.testing.assert_close(output(theirs, signature), output(ours, signature), rtol=1e-5, atol=1e-6)
    assert read(tmp_path / "history.json", tiny_distilbert).keep == plan.keep


def test_positions_of_a_later_entry_are_those_that_the_earlier_left(tiny_bert, tmp_path):
    layer = "bert.encoder.layer.0.intermediate.dense"
    plan = read(write(tmp_path, [[layer, True, [0, 1]], [layer, True, [0]]]), tiny_bert)
    assert plan.keep["bert.encoder.layer.0.intermediate"][UnitKind.NEURON] == list(range(3, 48))
    through_out = read(write(tmp_path, [["bert.encoder.layer.0.output.dense", False, [0, 1, 2]]]), tiny_bert)
    assert through_out.keep == plan.keep


@pytest.mark.parametrize(
    ("history", "match"),
    [
        ([["bert.embeddings.word_embeddings", True, [0]]], "are no units of the model"),
        ([["bert.encoder.layer.0.attention.self.query", True, [0]]], "heads lose unequally many dimensions"),
        ([["bert.encoder.layer.0.intermediate.dense", True, [48]]], r"had 48 channels left, got \[48\]"),
    ],
)
def test_history_that_no_plan_can_say_is_refused_by_entry(history, match, tiny_bert, tmp_path):
    with pytest.raises(PlanError, match=match):
        read(write(tmp_path, history), tiny_bert)


def test_history_of_grouped_queries_is_refused_for_attention(tiny_llama, tmp_path):
    with pytest.raises(PlanError, match="query heads share keys and values"):
        read(write(tmp_path, [["model.layers.0.self_attn.q_proj", True, [0]]]), tiny_llama)


def test_what_is_no_history_is_refused(tiny_bert, tmp_path):
    with pytest.raises(ArtifactError, match=r"not a pruning history in .*entry 0"):
        read(write(tmp_path, [["layer", 1, [0]]]), tiny_bert)


def test_heads_by_layer_are_removed_and_written_back(tiny_bert, tmp_path):
    plan = read(write(tmp_path, {"0": [1, 3], "bert.encoder.layer.1.attention": [0]}), tiny_bert)
    sites = find_sites(tiny_bert)
    assert [plan.keep[s.name][UnitKind.HEAD] for s in sites if s.heads] == [[0, 2], [1, 2, 3]]
    export_plan(plan, sites, tmp_path / "heads.json", "heads")
    assert json.loads((tmp_path / "heads.json").read_text()) == {"0": [1, 3], "1": [0]}
    compact(tiny_bert, plan)


def test_a_part_of_a_key_value_group_is_refused(tiny_llama, tmp_path):
    with pytest.raises(PlanError, match=r"removes query heads \[1\] of key/value head 0, which owns 0-1"):
        read(write(tmp_path, {"0": [1]}), tiny_llama)
    assert read(write(tmp_path, {"0": [0, 1]}), tiny_llama).keep["model.layers.0.self_attn"][UnitKind.HEAD] == [2, 3]


def test_all_heads_of_a_layer_let_its_attention_vanish(tiny_bert, tmp_path):
    plan = read(write(tmp_path, {"0": [0, 1, 2, 3]}), tiny_bert)
    assert plan.vanishes(next(s for s in find_sites(tiny_bert) if s.heads))


def test_heads_that_are_not_there_are_all_named(tiny_bert, tmp_path):
    with pytest.raises(PlanError, match=r"layer 0: heads \[4\], the layer has 0-3(.|\n)*layer 7: the model has 2"):
        read(write(tmp_path, {"0": [4], "7": [0]}), tiny_bert)


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_llama"])
def test_masks_say_every_plan_and_come_back(name, request, tmp_path):
    model = request.getfixturevalue(name)
    path = random_path(model, signature_of(name), seed=5)
    plan = path.plan(0.4)
    export_plan(plan, path.sites, tmp_path / "masks.npz", "masks")
    assert read(tmp_path / "masks.npz", model).keep == plan.keep
    with np.load(tmp_path / "masks.npz") as masks:
        write(tmp_path, {key: masks[key].tolist() for key in masks.files})
    assert read(tmp_path / "plan.json", model).keep == plan.keep


def test_masks_of_kwon_are_read_beside_each_other_and_written(tiny_bert, tmp_path):
    heads, neurons = torch.ones(2, 4), torch.ones(2, 48)
    heads[0, 2] = neurons[1, 5] = 0
    torch.save(heads, tmp_path / "head_mask.pt")
    torch.save(neurons, tmp_path / "neuron_mask.pt")
    plan = read(tmp_path / "head_mask.pt", tiny_bert)
    sites = find_sites(tiny_bert)
    assert plan.keep["bert.encoder.layer.0.attention"][UnitKind.HEAD] == [0, 1, 3]
    assert 5 not in plan.keep["bert.encoder.layer.1.intermediate"][UnitKind.NEURON]
    export_plan(plan, sites, tmp_path / "kwon.npz", "layer-masks")
    with np.load(tmp_path / "kwon.npz") as masks:
        np.testing.assert_array_equal(masks["head_mask"], heads.numpy())
        np.testing.assert_array_equal(masks["neuron_mask"], neurons.numpy())


def test_scaled_masks_and_masks_of_another_model_are_refused(tiny_bert, tmp_path):
    np.savez(tmp_path / "m.npz", head_mask=np.full((2, 4), 0.7), neuron_mask=np.ones((2, 47)), other=np.ones(3))
    with pytest.raises(PlanError, match=r"values other than 0 and 1(.|\n)*\(2, 47\)(.|\n)*other: expected head_mask"):
        read(tmp_path / "m.npz", tiny_bert)


class Trap:
    def __reduce__(self):
        return (os.mkdir, (os.environ["TRAP"],))


def test_a_pickle_is_never_opened(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    torch.save({"head_mask": Trap()}, tmp_path / "head_mask.pt")
    with pytest.raises(ArtifactError, match="not a file of plain tensors"):
        read(tmp_path / "head_mask.pt", tiny_bert)
    np.savez(tmp_path / "m.npz", head_mask=np.array([Trap()], dtype=object))
    with pytest.raises(ArtifactError, match=r"not an \.npz of plain arrays"):
        read(tmp_path / "m.npz", tiny_bert)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["m.npz", "head_mask.pt"])
def test_damaged_masks_are_refused_in_words(name, tiny_bert, tmp_path):
    whole = tmp_path / "whole"
    if name.endswith(".npz"):
        np.savez(whole.with_suffix(".npz"), head_mask=np.ones((2, 3)))
    else:
        torch.save(torch.ones(2, 3), whole.with_suffix(".pt"))
    data = whole.with_suffix(Path(name).suffix).read_bytes()
    for damaged in (b"", b"hello", b"\x80\x02.", data[:60], data[:-10], data[:150] + bytes(8) + data[158:]):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ArtifactError, match="not a"):
            read(tmp_path / name, tiny_bert)


def test_forms_refuse_what_they_cannot_say(tiny_bert, tmp_path):
    path = random_path(tiny_bert, signature_of("tiny_bert"), seed=5)
    plan = path.plan(0.4)
    for form, match in (
        ("heads", "neuron units left"),
        ("layer-masks", "qk units left"),
        ("history", "are not the value dimensions that left"),
    ):
        with pytest.raises(PlanError, match=match):
            export_plan(plan, path.sites, tmp_path / "out.npz", form)
    with pytest.raises(UsageError, match="unknown form"):
        export_plan(plan, path.sites, tmp_path / "out.npz", "pickles")
    assert not list(tmp_path.iterdir())


def test_a_plan_without_a_path_costs_what_a_path_says_it_costs(tiny_llama):
    path = random_path(tiny_llama, signature_of("tiny_llama"), seed=5)
    plan = path.plan(0.4)
    assert costs_of(plan, path.sites, path.costs) == plan.achieved
    bare = plan.model_copy(update={"achieved": None, "asked": None})
    again = path_of_plan(bare, path.sites, path.costs)
    assert given_plan(again) == plan.model_copy(update={"asked": None})
    for site, kind in groups(path.sites):
        assert np.flatnonzero(again.scores[f"{site.name}/{kind.value}"] == 1.0).tolist() == plan.kept(site, kind)
    with pytest.raises(PlanError, match="removes nothing"):
        path_of_plan(dense_plan("tiny", plan.weights_sha256, path.sites), path.sites, path.costs)


def test_command_line_imports_builds_and_exports(tiny_bert, saved, tmp_path):
    model = f"hf:{saved(tiny_bert)}"
    words = [f"w{i % 90} w{i % 7}\t{i % 3}" for i in range(40)]
    (tmp_path / "data.tsv").write_text("\n".join(["text\tlabel", *words]))
    heads = write(tmp_path, {"0": [1], "1": [0, 2]}, "heads.json")
    plan, bundle = tmp_path / "plan.json", tmp_path / "out"
    assert run_command(["-q", "plan", "import", str(heads), "--model", model, "-o", str(plan)]) == 0
    data = f"tsv:{tmp_path / 'data.tsv'}"
    build = ["plan", "build", str(plan), "--task", "text-classification", "--data", data, "--eval", data, "--no-bench"]
    assert run_command(["-q", *build, "-o", str(bundle)]) == 0
    assert run_command(["-q", "verify", str(bundle)]) == 0
    (member,) = (file for file in (bundle / "plans").iterdir())
    assert PrunePlan.load(member).keep == PrunePlan.load(plan).keep
    back = tmp_path / "back.json"
    assert run_command(["-q", "plan", "export", str(member), "--form", "heads", "--model", model, "-o", str(back)]) == 0
    assert json.loads(back.read_text()) == {"0": [1], "1": [0, 2]}
    assert run_command(["-q", "plan", "export", str(member), "--form", "heads", "--model", "hf:no", "-o", "x"]) == 3
