"""The parts of recovery, one rule each: rates, means, hidden states, regularisers, examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import deploy_prune as dp
from deploy_prune import distributed
from deploy_prune.data import Examples
from deploy_prune.recovery.augment import augmented_batches
from deploy_prune.recovery.ema import Ema
from deploy_prune.recovery.feed import Feed, split
from deploy_prune.recovery.hidden import hidden_error, layers_of, recording
from deploy_prune.recovery.options import RecoverOptions
from deploy_prune.recovery.regularise import dropping_paths, soften
from deploy_prune.recovery.schedule import decay_groups, rate_at
from deploy_prune.recovery.state import Mark
from deploy_prune.tasks import Batch, Task, load_task

Save = Callable[[nn.Module], Path]


def pictures(count: int = 24) -> Examples:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(count)]
    return Examples("made", {"image": images, "label": [i % 5 for i in range(count)]})


@pytest.fixture
def task(tiny_vit: nn.Module) -> Task:
    options = {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    return load_task("image-classification", model=tiny_vit, model_ref="x", calibration=pictures(), **options)


def test_the_rate_rises_linearly_then_falls_by_a_cosine_to_almost_nothing() -> None:
    rates = [rate_at(step, 100, 0.1) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert rates[10] == 1.0 == max(rates) and rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 1e-3
    assert rate_at(0, 1, 0.0) > 0


def test_norms_biases_and_what_the_model_exempts_do_not_decay(tiny_vit: nn.Module) -> None:
    decayed, plain = decay_groups(tiny_vit, 0.1)
    names = {id(p): n for n, p in tiny_vit.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)] for p in decayed["params"]} == {
        n for n, p in tiny_vit.named_parameters() if p.ndim > 1 and n not in ("pos_embed", "cls_token")
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_the_mean_of_weights_follows_early_and_takes_their_place_only_within_the_block() -> None:
    weights = {"w": torch.tensor([1.0])}
    ema = Ema(weights, 0.99)
    weights["w"].fill_(2.0)
    ema.update(weights, 1)  # d = 2/11
    assert ema.mean["w"].item() == pytest.approx(1 * 2 / 11 + 2 * 9 / 11)
    with ema.in_place_of(weights):
        assert weights["w"].item() == ema.mean["w"].item()
    assert weights["w"].item() == 2.0


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("tiny_vit", ["blocks.0", "blocks.1"]),
        ("tiny_bert", ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
        ("tiny_distilbert", ["distilbert.transformer.layer.0", "distilbert.transformer.layer.1"]),
        ("tiny_llama", ["model.layers.0", "model.layers.1"]),
    ],
)
def test_layers_are_the_nearest_members_of_a_list_around_the_sites(
    family: str, layers: list[str], request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(family)
    assert layers_of(model, dp.find_sites(model)) == layers


def test_hidden_states_are_those_of_every_layer_and_equal_models_have_no_error(tiny_vit: nn.Module) -> None:
    with recording(tiny_vit, ["blocks.0", "blocks.1"]) as record, torch.no_grad():
        tiny_vit(torch.randn(2, 3, 32, 32))
        states = record.take()
    assert [tuple(s.shape) for s in states] == [(2, 17, 48)] * 2 and record.take() == []
    assert hidden_error(states, states, None) == 0
    assert hidden_error([s + 1 for s in states], states, None) > 0
    assert not any(m._forward_hooks for m in tiny_vit.modules())


def test_hidden_states_of_padding_do_not_count() -> None:
    dense, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    own = dense.clone()
    own[1, 2:] = 1e3
    assert hidden_error([own], [dense], mask) == 0
    assert hidden_error([own], [dense], None) > 0


def test_the_hidden_error_is_blind_to_the_scale_of_a_layer() -> None:
    dense, own = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    torch.testing.assert_close(hidden_error([own], [dense], None), hidden_error([100 * own], [100 * dense], None))


def test_a_dropped_path_adds_nothing_and_kept_ones_make_up_for_it(tiny_vit: nn.Module) -> None:
    outputs: list[torch.Tensor] = []
    sites, layers = dp.find_sites(tiny_vit), ["blocks.0", "blocks.1"]
    with dropping_paths(tiny_vit, sites, layers, 0.5) as paths, torch.no_grad():
        tiny_vit.get_submodule("blocks.1.mlp.fc2").register_forward_hook(lambda *a: outputs.append(a[2].clone()))
        images = torch.randn(1, 3, 32, 32).expand(16, -1, -1, -1)
        plain = tiny_vit(images)
        assert paths.chances == {"blocks.1.attn.proj": 0.5, "blocks.1.mlp.fc2": 0.5}  # the first layer is never skipped
        torch.manual_seed(0)
        paths.draw(16)
        tiny_vit(images)
        zero = outputs[1].abs().amax((1, 2)) == 0
        assert 2 < zero.sum() < 14
        paths.clear()
        assert torch.equal(tiny_vit(images), plain)


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixed_images_have_targets_in_the_shares_of_their_pixels(options: dict[str, float]) -> None:
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    for seed in range(8):
        mixed = soften(
            Batch({"pixel_values": images}, torch.tensor([0, 1])),
            RecoverOptions(**options),
            4,
            np.random.default_rng(seed),
        )
        assert mixed.target is not None
        torch.testing.assert_close(mixed.target.sum(1), torch.ones(2))
        torch.testing.assert_close(mixed.inputs["pixel_values"].mean((1, 2, 3)), mixed.target[:, 1])


def test_smoothed_labels_leave_the_inputs_alone() -> None:
    batch = Batch({"input_ids": torch.tensor([[1, 2]])}, torch.tensor([1]))
    smooth = soften(batch, RecoverOptions(label_smoothing=0.2), 2, np.random.default_rng(0))
    torch.testing.assert_close(smooth.target, torch.tensor([[0.1, 0.9]]))
    assert torch.equal(smooth.inputs["input_ids"], batch.inputs["input_ids"])


def test_what_happens_to_an_image_follows_from_seed_epoch_and_index_whoever_prepares_it(task: Task) -> None:
    options = {"crop": 0.3, "flip": 0.5, "randaugment": "rand-m9-mstd0.5-inc1", "erasing": 0.5}
    order = [[3, 1, 4], [2, 7]]

    def pixels(key: tuple[int, int], workers: int = 0, order: list[list[int]] = order) -> list[torch.Tensor]:
        chosen = RecoverOptions(workers=workers, **options)
        return [batch.inputs["pixel_values"] for batch in augmented_batches(task, order, chosen, key)]

    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    first = pixels((0, 1))
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()  # type: ignore[union-attr]
    assert [tuple(p.shape) for p in first] == [(3, 3, 32, 32), (2, 3, 32, 32)]
    assert all(torch.equal(a, b) for a, b in zip(first, pixels((0, 1), workers=2), strict=True))
    assert torch.equal(pixels((0, 1), order=[[4]])[0][0], first[0][2])
    assert not torch.equal(pixels((0, 2))[0], first[0])


def test_held_out_examples_are_never_trained_on_and_every_other_one_is(task: Task) -> None:
    options = RecoverOptions(holdout=0.25, batch_size=6)
    train, held_out = split(task, options)
    assert len(held_out) == 6 and sorted(train + held_out) == list(range(24))
    feed = Feed(task, train, options, seed=0)
    assert sorted(item for batch in feed.epoch(0) for item in batch) == train
    assert feed.epoch(0) != feed.epoch(1) and feed.steps == 30


def test_a_run_that_starts_later_sees_what_the_whole_run_sees_then(task: Task) -> None:
    feed = Feed(task, range(20), RecoverOptions(batch_size=6), seed=0, micro_batch=4)
    whole, late = feed.batches(0), feed.batches(5)
    for _ in range(5):
        next(whole)
    for _ in range(4):  # three steps to an epoch
        for a, b in zip(next(whole), next(late), strict=True):
            assert torch.equal(a.inputs["pixel_values"], b.inputs["pixel_values"])


def test_processes_share_every_batch_out(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    options = RecoverOptions(batch_size=7)
    alone = [item for batch in Feed(task, range(21), options, seed=0).epoch(0) for item in batch[:6]]
    monkeypatch.setattr(distributed, "count", lambda: 2)
    seen: list[torch.Tensor] = []
    for index in (0, 1):
        monkeypatch.setattr(distributed, "index", lambda index=index: index)
        stream = Feed(task, range(21), options, seed=0, micro_batch=2).batches(0)
        for _ in range(3):
            pieces = next(stream)
            assert [len(piece) for piece in pieces] == [2, 1]
            seen += [piece.target for piece in pieces if piece.target is not None]
    labels = [item % 5 for item in alone]
    assert sorted(torch.cat(seen).tolist()) == sorted(labels)


def test_equal_values_are_told_apart_by_the_loss_and_nan_loses() -> None:
    assert Mark(2, 0.9, 0.5).beats(Mark(1, 0.9, 0.6), True) and not Mark(2, 0.9, 0.6).beats(Mark(1, 0.9, 0.6), True)
    assert Mark(2, 20.0, 3.0).beats(Mark(1, 30.0, 3.4), False)
    assert not Mark(2, float("nan"), 0.1).beats(Mark(1, 0.1, 0.6), True)


def test_the_papers_recipe_scales_its_rate_with_the_batch_and_gives_way_to_single_options() -> None:
    assert RecoverOptions(recipe="spp-imagenet").rate == 1e-4
    chosen = RecoverOptions.model_validate({"recipe": "spp-imagenet", "batch_size": 128, "mixup": 0.0, "steps": 10})
    assert (chosen.rate, chosen.mixup, chosen.cutmix, chosen.epochs) == (2.5e-5, 0.0, 1.0, None)
    assert (chosen.ema, chosen.drop_path, chosen.erasing, chosen.label_smoothing) == (0.99996, 0.1, 0.25, 0.1)
    again: Any = chosen.model_dump(exclude_unset=True)
    assert RecoverOptions.model_validate(again) == chosen
