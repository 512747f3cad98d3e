"""Figures from samples: intervals that hold the truth as often as they say, and verdicts that follow from them."""

from __future__ import annotations

import numpy as np
import pytest

from bench.stats import Ratio, percentiles, ratio_of_medians, sound, verdict, written


def drawn(
    ratio: float,
    seed: int,
    *,
    rounds: int = 60,
    sessions: int = 1,
    shared: float = 0.0,
    own: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Synthetic (candidate, baseline) timings around 1 ms. `shared`: log spread of a round, common to both models;
    `own`: log spread of each model's session."""
    generator = np.random.default_rng(seed)
    common = generator.normal(0, shared, (rounds, 1)) if shared else np.zeros((rounds, 1))
    pair = []
    for median in (ratio, 1.0):
        session = np.repeat(generator.normal(0, own, sessions), rounds // sessions)[:, None] if own else 0.0
        noise = generator.normal(0, 0.05, (rounds, 4)) + generator.exponential(0.03, (rounds, 4))
        pair.append(median * 1e6 * np.exp(common + session + noise))
    return pair[0], pair[1]


def coverage(ratio: float, draws: int, **options: float) -> float:
    held = 0
    for seed in range(draws):
        candidate, baseline = drawn(ratio, seed, **options)  # type: ignore[arg-type]
        sessions = int(options.get("sessions", 1))
        interval = ratio_of_medians(candidate, baseline, seed=seed, resamples=400, sessions=sessions)
        held += interval.low <= ratio <= interval.high
    return held / draws


def test_percentiles_of_one_to_hundred_are_interpolated() -> None:
    assert percentiles(np.arange(101.0)) == (50.0, 90.0, 99.0)


def test_ratio_is_that_of_the_pooled_medians() -> None:
    ratio = ratio_of_medians(np.array([[2, 2], [2, 9]]), np.array([[4, 4], [1, 4]]))
    assert ratio.value == 0.5


def test_identical_samples_have_a_ratio_of_exactly_one() -> None:
    samples = np.random.default_rng(0).normal(100, 30, (40, 3))
    assert ratio_of_medians(samples, samples) == Ratio(1.0, 1.0, 1.0)


def test_same_seed_gives_the_same_interval() -> None:
    candidate, baseline = drawn(0.8, 3)
    assert ratio_of_medians(candidate, baseline, seed=7) == ratio_of_medians(candidate, baseline, seed=7)


def test_drawing_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate, baseline = drawn(0.8, 3)
    whole = ratio_of_medians(candidate, baseline, resamples=50)
    monkeypatch.setattr("bench.stats._CHUNK", candidate.size)
    assert ratio_of_medians(candidate, baseline, resamples=50).value == whole.value


@pytest.mark.parametrize("ratio", [0.7, 1.0])
def test_interval_holds_the_known_ratio_in_about_95_percent_of_draws(ratio: float) -> None:
    assert 0.91 <= coverage(ratio, 200) <= 0.985


def test_interval_stays_honest_when_rounds_are_disturbed_together() -> None:
    assert coverage(0.9, 150, shared=0.3) >= 0.91


def test_pairing_by_round_keeps_the_interval_narrow_when_rounds_are_disturbed_together() -> None:
    candidate, baseline = drawn(0.9, 0, shared=0.3)
    paired = ratio_of_medians(candidate, baseline)
    broken = ratio_of_medians(candidate[np.random.default_rng(1).permutation(len(candidate))], baseline)
    assert paired.high - paired.low < 0.6 * (broken.high - broken.low)


def test_drawing_sessions_keeps_the_interval_honest_when_every_session_has_its_own_speed() -> None:
    aware = coverage(1.0, 100, sessions=5, own=0.03)
    naive = np.mean(
        [ratio_of_medians(*drawn(1.0, seed, sessions=5, own=0.03), resamples=400).holds_one for seed in range(100)]
    )
    assert aware >= 0.85 > naive + 0.1


@pytest.mark.parametrize("shape", [((3, 2), (2, 2)), ((4,), (4,)), ((0, 2), (0, 2))])
def test_samples_that_cannot_be_paired_are_refused(shape: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="two equal"):
        ratio_of_medians(np.ones(shape[0]), np.ones(shape[1]))


def test_rounds_that_do_not_divide_into_sessions_are_refused() -> None:
    with pytest.raises(ValueError, match="5 rounds are not 2 equal sessions"):
        ratio_of_medians(np.ones((5, 1)), np.ones((5, 1)), sessions=2)


@pytest.mark.parametrize(
    ("ratio", "again", "expected"),
    [
        (Ratio(0.70, 0.68, 0.72), Ratio(1.00, 0.99, 1.01), "faster"),
        (Ratio(1.30, 1.20, 1.40), Ratio(1.00, 0.99, 1.01), "slower"),
        (Ratio(0.99, 0.97, 1.01), Ratio(1.00, 0.99, 1.01), "no measurable change"),
        (Ratio(0.97, 0.96, 0.98), Ratio(1.05, 1.04, 1.06), "no measurable change"),  # 0.98 * 1.05 > 1
        (Ratio(0.97, 0.96, 0.98), Ratio(0.95, 0.94, 0.96), "no measurable change"),  # a deviation counts either way
        (Ratio(0.90, 0.89, 0.91), Ratio(1.05, 1.04, 1.06), "faster"),
    ],
)
def test_verdict_asks_whether_the_change_exceeds_the_baselines_own_deviation(
    ratio: Ratio, again: Ratio, expected: str
) -> None:
    assert verdict(ratio, again) == expected


def test_written_ratio_has_as_many_digits_as_its_interval_deserves() -> None:
    assert written(Ratio(0.7123, 0.6, 0.8)) == "0.71 [0.60, 0.80]"
    assert written(Ratio(0.7123, 0.7113, 0.7133)) == "0.7123 [0.7113, 0.7133]"
    assert written(Ratio(1.0, 1.0, 1.0)) == "1.00 [1.00, 1.00]"


@pytest.mark.parametrize(
    ("self_check", "speaks"),
    [
        (Ratio(1.03, 0.98, 1.08), True),  # holds 1
        (Ratio(0.998, 0.997, 0.9995), True),  # misses it by what the verdicts allow for
        (Ratio(1.03, 1.02, 1.04), False),
        (Ratio(2.33, 0.14, 4.31), False),  # holds 1 and says nothing
    ],
)
def test_self_check_speaks_where_it_is_narrow_and_near_one(self_check: Ratio, speaks: bool) -> None:
    assert sound(self_check) is speaks
