"""An interrupted search goes on where it was, and finds what an uninterrupted one finds, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import assert_same_path
from stopping import StopAt

from deploy_prune.demo import digits_vit_untrained
from deploy_prune.errors import ArtifactError
from deploy_prune.methods import search
from deploy_prune.methods.compute import Compute, Kept
from deploy_prune.saved_state import SavedState
from deploy_prune.tasks import load_task

STEPS = 30


@pytest.fixture(scope="module")
def digits() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = digits_vit_untrained()
    task = load_task("image-classification", model=model, model_ref="x", calibration="digits:train", evaluation=None)
    return model, task


def find(digits: tuple[Any, Any], method: str, **how: Any) -> Any:
    model, task = digits
    method, _, basis = method.partition(" ")
    options = {"steps": STEPS, "objective": "distill", "stages": []} if method == "spp" else {}
    settings = {"examples": 64, "batch_size": 16, "precision": "fp32", **options, **how}
    return search(model, task, method, basis=basis or "own", **settings)


def saved(directory: Path, identity: str = "this search") -> SavedState:
    return SavedState(directory, identity, minutes=0)


@pytest.mark.parametrize(
    ("method", "label", "count"),
    [
        ("spp", "spp: dense outputs", 2),
        ("spp", "spp: curvature", 3),
        ("spp", "spp: search", 1),
        ("spp", "spp: search", 9),
        ("spp", "spp: search", 15),
        ("fisher", "gate gradients", 2),
        ("taylor", "gate gradients", 3),
        ("fisher principal", "gate gradients", 2),
    ],
)
def test_an_interrupted_search_ends_in_the_same_bytes(
    digits: tuple[Any, Any], tmp_path: Path, method: str, label: str, count: int
) -> None:
    find(digits, method).save(tmp_path / "whole.safetensors")
    with pytest.raises(KeyboardInterrupt):
        find(digits, method, saved=saved(tmp_path / "work"), progress=StopAt(label, count))
    rest = StopAt("nothing", 1)
    find(digits, method, saved=saved(tmp_path / "work"), progress=rest).save(tmp_path / "resumed.safetensors")
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "resumed.safetensors").read_bytes()
    files = [path.name for path in (tmp_path / "work").rglob("*") if path.is_file()]
    # every pass, and what the search found in the end
    assert len(files) == {"spp": 4, "fisher principal": 3}.get(method, 2)
    assert not any(name.startswith(".partial") for name in files)


def test_a_resumed_search_does_not_do_again_what_was_saved(digits: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        find(digits, "spp", saved=saved(tmp_path), progress=StopAt("spp: search", 9))
    passes: list[int] = []
    handle = digits[0].register_forward_hook(lambda *_: passes.append(1))
    rest = StopAt("nothing", 1)
    find(digits, "spp", saved=saved(tmp_path), progress=rest)
    handle.remove()
    steps = rest.steps["spp: search"] - 9
    assert 4 < steps <= STEPS - 9
    assert len(passes) == 1 + steps + 4, "for the costs, the steps that were left, the dense outputs of 4 batches"


def test_a_state_of_another_search_is_not_taken_up(tmp_path: Path) -> None:
    saved(tmp_path, "one").save("name", {"x": torch.ones(2)}, {"done": 3})
    state = saved(tmp_path, "one").load("name")
    assert state is not None and state.facts == {"done": 3} and state.tensors["x"].tolist() == [1, 1]
    assert saved(tmp_path, "two").load("name") is None
    assert saved(tmp_path, "one").load("other") is None


def test_what_another_method_left_is_not_taken_up(digits: tuple[Any, Any], tmp_path: Path) -> None:
    alone = find(digits, "magnitude")
    find(digits, "fisher", saved=saved(tmp_path))
    after = find(digits, "magnitude", saved=saved(tmp_path))
    assert after.content_sha256() == alone.content_sha256()


def test_states_are_saved_when_their_time_has_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    state = SavedState(tmp_path, minutes=5)
    assert not state.due()
    clock[0] = 300.0
    assert state.due()
    state.save("name", {}, {})
    assert not state.due()
    assert not SavedState().due()


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    saved(tmp_path).save("name", {"x": torch.ones(2)}, {})
    file = tmp_path / "name.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match="saved state"):
        saved(tmp_path).load("name")


def test_sums_of_more_processes_than_now_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy_prune import distributed

    state = saved(tmp_path)
    monkeypatch.setattr(distributed, "gather", lambda value: [value, {"x": torch.ones(2)}])
    state.save("name", {"x": torch.full((2,), 5.0)}, {}, per_process=True)
    loaded = state.load("name")
    assert loaded is not None and loaded.tensors["x"].tolist() == [6, 6]


@pytest.mark.parametrize("objective", ["distill", "task"])
def test_what_memory_and_pieces_are_used_changes_nothing_but_rounding(digits: tuple[Any, Any], objective: str) -> None:
    plain = find(digits, "spp", objective=objective)
    without_memory = find(digits, "spp", objective=objective, compute=Compute(memory_gb=0))
    pieces = find(digits, "spp", objective=objective, compute=Compute(micro_batch=5, activation_checkpointing=True))
    for key, scores in plain.scores.items():
        assert np.array_equal(scores, without_memory.scores[key])
    assert_same_path(pieces.scores, plain.scores)


def test_what_does_not_fit_is_made_again() -> None:
    made: list[str] = []

    def make(name: str) -> dict[str, torch.Tensor]:
        made.append(name)
        return {"x": torch.zeros(10)}

    kept = Kept(100)  # two of 40 bytes each
    for name in ("a", "b", "c", "a", "b", "c"):
        kept.get(name, lambda name=name: make(name))
    assert made == ["a", "b", "c", "c"]


def test_activation_checkpointing_keeps_less_and_changes_no_bit(tiny_llama: Any) -> None:
    from deploy_prune.adapters import find_sites
    from deploy_prune.blocks import activation_checkpointing
    from deploy_prune.gates import gated, open_gates

    sites = find_sites(tiny_llama.requires_grad_(False))
    ids = torch.arange(40).view(4, 10)

    def run() -> tuple[list[torch.Tensor], int]:
        held = [0]

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            held[0] += tensor.numel()
            return tensor

        gates = open_gates(sites)
        for gate in gates.values():
            gate.requires_grad_(True)
        with gated(tiny_llama, sites, gates), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = tiny_llama(ids, use_cache=False).logits.logsumexp(-1).sum()
            forward = held[0]
            return list(torch.autograd.grad(loss, list(gates.values()))), forward

    plain, kept = run()
    with activation_checkpointing(tiny_llama, sites):
        again, kept_less = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert kept_less < kept / 2
    assert run()[1] == kept, "afterwards the model is as before"
