"""A delta leads from the base to the task and back, bit for bit, and nowhere from anything else."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploy_prune.delta import TaskDelta, stack
from deploy_prune.delta.positions import decode, encode, entropy_bits
from deploy_prune.errors import ArtifactError, DeployPruneError, UsageError


def model(seed: int = 0, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, classes))


def state(m: nn.Module) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in m.state_dict().items()}


def changed(base: nn.Module, count: int, seed: int = 1, head: bool = False) -> nn.Module:
    """A copy with `count` values of each matrix replaced."""
    result = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in result.named_parameters():
            if p.dim() == 2 and (head or not name.startswith("3.")):
                where = torch.randperm(p.numel(), generator=generator)[:count]
                p.view(-1)[where] += torch.randn(len(where), generator=generator)
    return result


HEAD = ("3.weight", "3.bias")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_positions_survive_coding(data):
    size = data.draw(st.integers(1, 5000))
    chosen = data.draw(st.sets(st.integers(0, size - 1), max_size=300))
    positions = np.array(sorted(chosen), np.int64)
    coded, k = encode(positions, size)
    assert np.array_equal(decode(coded, k, len(positions), size), positions)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64), st.integers(-2, 70), st.integers(0, 100), st.integers(0, 1000))
def test_bytes_that_are_no_positions_are_refused_or_give_legal_ones(data, k, count, size):
    try:
        found = decode(np.frombuffer(data, np.uint8), k, count, size)
    except ArtifactError:
        return
    assert len(found) == count
    assert (found >= 0).all()
    assert (found < size).all()
    assert (np.diff(found) > 0).all()


@pytest.mark.parametrize("share", [0.001, 0.005, 0.05, 0.5])
def test_positions_take_little_more_than_their_entropy(share):
    size = 400_000
    positions = np.flatnonzero(np.random.default_rng(0).random(size) < share)
    coded, _ = encode(positions, size)
    assert len(coded) * 8 < 1.06 * entropy_bits(len(positions), size)


def test_applying_and_subtracting_are_exact_and_leave_other_tensors(tmp_path):
    base = model()
    task = changed(base, 17, head=True)
    delta = TaskDelta.between(base, task, HEAD)
    delta.save(tmp_path / "a.safetensors")
    delta = TaskDelta.load(tmp_path / "a.safetensors")
    made = delta.apply(copy.deepcopy(base))
    assert state(made) == state(task)
    delta.subtract(made)
    back, dense = state(made), state(base)
    assert {n: b for n, b in back.items() if n not in HEAD} == {n: b for n, b in dense.items() if n not in HEAD}
    assert delta.count == 17


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]), st.integers(0, 40), st.integers()
)
def test_any_values_in_any_type_come_back(dtype, count, seed):
    base = model().to(dtype)
    task = copy.deepcopy(base)
    generator = np.random.default_rng(abs(seed))
    with torch.no_grad():
        for p in task.parameters():
            flat = p.view(-1).view(torch.uint8)
            where = generator.integers(0, len(flat), count)
            flat[where] = torch.from_numpy(generator.integers(0, 256, count).astype(np.uint8))  # NaN, infinities, -0
    delta = TaskDelta.between(base, task)
    bytes_of = lambda m: {n: t.flatten().view(torch.uint8).numpy().tobytes() for n, t in m.state_dict().items()}  # noqa: E731
    made = delta.apply(copy.deepcopy(base))
    assert bytes_of(made) == bytes_of(task)
    assert bytes_of(delta.subtract(made)) == bytes_of(base)


def test_a_head_of_other_classes_is_refused_before_anything_changes():
    base, task = model(classes=3), model(classes=7)
    with torch.no_grad():
        for name, p in task.named_parameters():
            if name not in HEAD:
                p.copy_(base.get_parameter(name))
    delta = TaskDelta.between(base, task, HEAD)
    assert delta.count == 0
    before = state(base)
    with pytest.raises(ArtifactError, match="head is not of the task's shape"):
        delta.apply(base)
    assert state(base) == before
    other = model(seed=4, classes=7)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name not in HEAD:
                p.copy_(base.get_parameter(name))
    assert state(delta.apply(other)) == state(task)


def test_stacked_deltas_bring_their_head_along():
    base = model()
    task = changed(base, 5, head=True)
    only = TaskDelta.between(base, task, HEAD)
    assert state(stack(base, {"only": only}).apply(copy.deepcopy(base))) == state(task)


def test_another_or_a_changed_base_is_refused_and_stays_as_it_was():
    base = model()
    delta = TaskDelta.between(base, changed(base, 5), HEAD)
    for wrong in (model(seed=5), changed(base, 1, seed=9), model().half()):
        before = state(wrong)
        with pytest.raises(ArtifactError, match="not the base model"):
            delta.apply(wrong)
        assert state(wrong) == before
    with pytest.raises(ArtifactError, match="with this delta applied"):
        delta.subtract(base)


def test_a_second_application_is_refused():
    base = model()
    delta = TaskDelta.between(base, changed(base, 5), HEAD)
    made = delta.apply(copy.deepcopy(base))
    with pytest.raises(ArtifactError, match="not the base model"):
        delta.apply(made)


def test_tied_tensors_change_once():
    base = model()
    base[3] = nn.Linear(20, 30)
    base[3].weight = base[0].weight
    task = copy.deepcopy(base)
    with torch.no_grad():
        task[0].weight[0, :4] += 1
    delta = TaskDelta.between(base, task)
    assert delta.count == 4
    assert state(delta.apply(copy.deepcopy(base))) == state(task)


def test_a_file_with_any_byte_changed_is_refused(tmp_path):
    base = model()
    file = tmp_path / "a.safetensors"
    TaskDelta.between(base, changed(base, 5), HEAD).save(file)
    whole = file.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[generator.integers(len(whole))] ^= int(generator.integers(1, 256))
        file.write_bytes(damaged)
        with pytest.raises(DeployPruneError):
            TaskDelta.load(file)


def test_deltas_of_one_base_stack(tmp_path):
    base = model()
    first, second = copy.deepcopy(base), copy.deepcopy(base)
    with torch.no_grad():
        first[0].weight[0] += 0.1
        second[0].weight[1] += 0.2
    a, b = TaskDelta.between(base, first), TaskDelta.between(base, second)
    both = stack(base, {"a": a, "b": b}).apply(copy.deepcopy(base))
    assert torch.equal(both[0].weight[0], first[0].weight[0])
    assert torch.equal(both[0].weight[1], second[0].weight[1])
    with pytest.raises(UsageError, match="change the same values"):
        stack(base, {"a": a, "again": a})
    twice = stack(base, {"a": a, "again": a}, overlap="add").apply(copy.deepcopy(base))
    torch.testing.assert_close(twice[0].weight[0], base[0].weight[0] + 0.2)


def test_models_of_other_shapes_have_no_delta():
    with pytest.raises(UsageError, match="more than values"):
        TaskDelta.between(model(classes=3), model(classes=4))
