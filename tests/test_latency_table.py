"""The latency table: additive by construction, ladders that follow bends, and a file that is whole or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.latency_table import BEND, LatencyTable, SiteTimes, first_rungs, next_rungs
from deploy_prune.errors import ArtifactError

ATTENTION = SiteTimes(
    ("head", "qk", "vo"),
    (4, 16, 16),
    ("a0", "a1"),
    {(4, 16, 16): 8.0, (1, 16, 16): 2.0, (2, 16, 16): 4.0, (4, 8, 16): 6.0, (4, 16, 8): 7.0},
    checks={(2, 8, 8): 2.5},
)
NEURONS = SiteTimes(("neuron",), (64,), ("m0", "m1"), {(64,): 4.0, (8,): 1.0, (32,): 2.0})


def table(dense: float = 26.0) -> LatencyTable:
    return LatencyTable(dense, 2.0, (ATTENTION, NEURONS), {"runtime": "fake"})


def test_dense_is_predicted_as_it_was_measured_and_a_model_without_sites_as_the_rest() -> None:
    for dense in (26.0, 30.0):
        found = table(dense)
        whole = {s: dict(zip(t.kinds, t.full, strict=True)) for t in found.shapes for s in t.sites}
        assert found.plan_ms(whole) == pytest.approx(dense)
        none = {s: dict.fromkeys(kinds, 0) for s, kinds in whole.items()}
        assert found.plan_ms(none) == pytest.approx(2.0)


def test_measured_widths_come_back_and_others_lie_between_their_neighbours() -> None:
    assert ATTENTION.ms((2, 16, 16)) == 4.0
    assert ATTENTION.ms((4, 8, 16)) == 6.0
    assert ATTENTION.ms((3, 16, 16)) == 6.0
    assert NEURONS.ms((48,)) == 3.0
    assert NEURONS.ms((0,)) == 0.0


def test_what_dimensions_save_is_saved_in_every_kept_head() -> None:
    assert ATTENTION.ms((4, 8, 8)) == pytest.approx(8 - 2 - 1)
    assert ATTENTION.ms((2, 8, 8)) == pytest.approx(4 - 1 - 0.5)
    assert ATTENTION.misses() == {(2, 8, 8): pytest.approx(0.0)}


def test_a_middle_tells_how_much_of_what_kinds_save_apart_they_save_together() -> None:
    with_middle = replace(ATTENTION, middle={(2, 8, 8): 3.0}, checks={(4, 8, 8): 6.0})
    assert with_middle.ms((2, 8, 8)) == pytest.approx(3.0)
    assert with_middle.ms((4, 8, 8)) == pytest.approx(8 - 2 - 1 + 2 * 0.5)
    assert with_middle.ms((4, 8, 16)) == 6.0 and with_middle.ms((2, 16, 16)) == 4.0  # ladders stay as measured
    assert with_middle.misses() == {(4, 8, 8): pytest.approx(0.0)}
    assert SiteTimes.from_json(with_middle.to_json()) == with_middle


def test_a_wider_site_is_no_faster_whatever_noise_says() -> None:
    noisy = SiteTimes(("neuron",), (64,), ("m",), {(64,): 8.0, (48,): 5.0, (32,): 6.0, (8,): 1.0})
    assert noisy.ladder(0) == [(8, 1.0), (32, 5.5), (48, 5.5), (64, 8.0)]


def test_no_width_is_free_however_far_the_ladders_reach() -> None:
    steep = SiteTimes(("neuron",), (64,), ("m",), {(64,): 4.0, (32,): 1.0})
    assert 0 < steep.ms((8,)) < 0.1


def test_a_straight_ladder_gets_no_further_rungs_and_a_bent_one_does() -> None:
    straight = [(8, 1.0), (32, 4.0), (64, 8.0)]
    assert next_rungs(straight, 8, 8.0) == []
    stair = [(8, 1.0), (32, 1.0), (64, 8.0)]
    assert next_rungs(stair, 8, 8.0) == [16, 48]
    within = [(8, 1.0), (32, 4.0 + 0.9 * BEND * 8), (64, 8.0)]
    assert next_rungs(within, 8, 8.0) == []


@pytest.mark.parametrize(
    ("full", "step", "rungs"), [(3072, 8, [8, 1536, 3072]), (3, 1, [1, 2, 3]), (8, 8, [8]), (1, 1, [1])]
)
def test_the_first_rungs_are_the_narrowest_half_and_all(full: int, step: int, rungs: list[int]) -> None:
    assert first_rungs(full, step) == rungs


def test_a_table_survives_its_file_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    table().save(file)
    assert LatencyTable.load(file) == table()
    data = json.loads(file.read_text())
    for broken in (
        {**data, "_version": 9},
        {**data, "rest_ms": 99.0},
        {k: v for k, v in data.items() if k != "shapes"},
    ):
        file.write_text(json.dumps(broken))
        with pytest.raises(ArtifactError):
            LatencyTable.load(file)
