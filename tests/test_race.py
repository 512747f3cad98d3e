"""The race: verdicts say what the examples say, files survive a kill, and the README says what the files say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.studies.contestants import contestants
from bench.studies.race import TERMS, Race, Terms
from bench.studies.race_analysis import SCORES, apart, counted, lost, paired, points, summary
from bench.studies.race_extras import recover_best
from bench.studies.race_plot import plot
from bench.studies.race_report import BEGIN, END, full, in_short, pages, with_section
from bench.studies.race_result import RaceResult, key_of
from deploy_prune.errors import UsageError
from deploy_prune.pipeline.setup import prepare
from deploy_prune.recipe import load_recipe

ROOT = Path(__file__).parents[1]
HEAD = {
    "recipe": "made-up",
    "metric": "top1",
    "identity": "a",
    "sparsities": [0.3, 0.5],
    "calibration_examples": 8,
    "prunable": 80,
    "params": 100,
    "peers": {"tp-obdc": {"package": "torch-pruning", "version": "1.6.1"}},
    "not_supported": {"tp-taylor": "no gradient here"},
}


def made_up(path: Path, **right: int) -> RaceResult:
    """A race on 200 examples of which the first so many are right, by contestant."""
    result = RaceResult(path, dict(HEAD))

    def add(contestant: str, form: str, asked: float, hits: int) -> None:
        values = (np.arange(200) < hits).astype(float)
        row = {"contestant": contestant, "form": form, "asked": asked, "value": hits / 200, "n": 200}
        row |= {"params": 100 - 80 * asked, "macs": 1000 * (1 - asked), "higher_is_better": True}
        result.add(row, values)

    add("dense", "dense", 0.0, 180)
    for name, hits in right.items():
        for asked in HEAD["sparsities"]:
            add(name, "own", asked, hits)
    return result


def test_a_clear_lead_is_ahead_and_its_mirror_behind(tmp_path):
    found = points(made_up(tmp_path / "r.json", spp=170, obs=140, fisher=100))
    assert [p.difference.standing for p in found] == ["ahead", "ahead"]
    assert [p.other["contestant"] for p in found] == ["obs", "obs"]
    assert summary(found).share == pytest.approx(5 / 20)
    found = points(made_up(tmp_path / "r.json", spp=140, obs=170))
    assert [p.difference.standing for p in found] == ["behind", "behind"]
    assert found[0].difference.value == pytest.approx(15)


def test_equal_models_are_within_noise_however_few_examples(tmp_path):
    found = points(made_up(tmp_path / "r.json", spp=150, obs=150))
    assert {p.difference.standing for p in found} == {"within noise"}


def test_pairing_sees_a_difference_that_separate_intervals_hide(tmp_path):
    """Six examples of 200 more: each figure alone is uncertain by ±6 points, their difference is not."""
    difference = paired(made_up(tmp_path / "r.json", spp=156, obs=150), "spp/own/0.3", "obs/own/0.3")
    assert difference.standing == "ahead" and difference.high - difference.low < 6


def test_a_race_goes_on_from_its_files_and_refuses_another_race(tmp_path):
    file = tmp_path / "r.json"
    before = made_up(file, spp=170, obs=140)
    after = RaceResult.open(file, dict(HEAD), fresh=False)
    assert after.rows == before.rows
    assert np.array_equal(after.per_example("obs/own/0.5"), before.per_example("obs/own/0.5"))
    with pytest.raises(UsageError, match="identity"):
        RaceResult.open(file, HEAD | {"identity": "b"}, fresh=False)
    after.drop("obs")
    assert not any(key.startswith("obs/") for key in (*after.rows, *after.values))


def test_what_all_models_share_is_stored_once_and_must_agree(tmp_path):
    result = RaceResult(tmp_path / "r.json", HEAD | {"metric": "perplexity"})
    rows = np.array([[30.0, 10.0], [50.0, 20.0]])
    result.add({"contestant": "dense", "form": "dense", "asked": 0.0}, rows)
    assert np.array_equal(RaceResult.load(result.path).per_example("dense/dense/0"), rows)
    with pytest.raises(ValueError, match="other examples"):
        result.add({"contestant": "spp", "form": "own", "asked": 0.3}, rows + 1)


def test_a_report_names_sizes_verdicts_versions_and_who_is_missing(tmp_path):
    result = made_up(tmp_path / "r.json", spp=170, obs=140)
    text = full(result)
    for part in (
        "| obs | as published | 70.0 | 70.0 |",
        "**85.0**",
        "ahead",
        "least over all sizes is obs (as published): 20.0 on average, of which ours loses 0.25.",
        "torch-pruning 1.6.1",
        "no gradient here",
    ):
        assert part in text
    plot(result, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_a_report_says_who_of_the_best_was_not_trained(tmp_path):
    result = made_up(tmp_path / "r.json", spp=170, obs=140, fisher=150)
    assert "Not trained" not in full(result)
    for name in ("spp", "obs"):
        row = {**result.rows[f"{name}/own/0.3"], "form": "recovered", "steps": 9}
        result.add(row, result.values[f"{name}/own/0.3"])
    assert "**Not trained**, though the best other without training: fisher at 30%." in full(result)
    assert "as searched" not in full(result)
    result.rows["spp/recovered/0.3"]["path"] = "as searched"
    assert "Ours at 30% was trained from its path as searched" in full(result)


def test_the_terms_of_the_races_are_those_of_the_committed_ones():
    for file in (ROOT / "bench" / "results").glob("race_*.json"):
        head = RaceResult.load(file).head
        terms = TERMS[head["recipe"]]
        found = (head["calibration_examples"], head["evaluation_limit"])
        more = file.stem.rpartition("_")[2]  # race_smollm2_128: of other terms, which its name says
        assert found == ((int(more), int(more)) if more.isdigit() else (terms.examples, terms.limit))


def test_rows_say_where_they_were_made_and_an_environment_is_noted_once(tmp_path):
    race = None
    for _ in range(2):
        setup = prepare(load_recipe("digits"))
        race = Race.start(setup, Terms(32, 16, 32), (0.3,), tmp_path / "work", tmp_path / "race.json")
        race.run(contestants()["random"])
    assert race is not None
    assert {row["device"] for row in race.result.rows.values()} == {setup.device.type}
    assert [len(noted) for noted in race.result.head["environments"].values()] == [1]


def test_the_best_are_trained_once_and_anew_on_other_terms(tmp_path):
    setup = prepare(load_recipe("digits"))
    race = Race.start(setup, Terms(32, 16, 32), (0.3,), tmp_path / "work", tmp_path / "race.json")
    for name in ("spp", "random"):
        race.run(contestants()[name])
    trained = []
    for training in ({}, {}, {"examples": 64}):
        recover_best(race, 1, 2, training)
        trained.append(race.result.rows["spp/recovered/0.3"])
    assert trained[0]["steps"] == 2 and "training" not in trained[0]
    assert trained[1] is trained[0]
    assert trained[2]["training"] == {"examples": 64}
    assert race.result.rows["random/recovered/0.3"]["training"] == {"examples": 64}
    assert "After the same recovery, 2 steps, examples 64:" in full(race.result)
    race.result.rows["random/recovered/0.3"]["steps"] = 3
    with pytest.raises(UsageError, match="unlike terms"):
        full(race.result)


def test_a_section_replaces_only_what_lies_between_its_markers():
    text = with_section(f"before\n{BEGIN}\nold\n{END}\nafter", "new")
    assert text == f"before\n{BEGIN}\nnew\n{END}\nafter"
    with pytest.raises(ValueError, match="no section"):
        with_section("nothing here", "new")


def test_the_documents_say_what_the_race_files_say():
    """Make it so with: python -m bench.studies.race_report bench/results/race_*.json --docs"""
    results = [RaceResult.load(file) for file in sorted((ROOT / "bench/results").glob("race_*.json"))]
    for target, body in pages(results).items():
        text = target.read_text(encoding="utf-8")
        assert text == with_section(text, body), target.name


def test_a_best_that_is_chosen_on_other_examples_is_no_better_than_its_kind(tmp_path):
    generator = np.random.default_rng(3)
    result = made_up(tmp_path / "r.json")

    def add(name: str, right: np.ndarray) -> None:
        row = {"contestant": name, "form": "own", "asked": 0.3, "value": right.mean(), "n": 200}
        result.add(row | {"params": 76, "macs": 700, "higher_is_better": True}, right.astype(float))

    for name in ("spp", *(f"other-{i}" for i in range(24))):
        add(name, generator.random(200) < 0.8)  # all alike but for chance
    (point,) = [p for p in points(result) if p.asked == 0.3]
    fair = apart(result, key_of(point.ours), point.others, resamples=50)
    chance = np.mean([lost(result, result.rows[key]) for key in point.others])
    assert point.other_lost < chance - 5 and point.other_lost + 2 < fair.other_lost < chance + 2
    assert fair.difference.low < fair.difference.value < fair.difference.high
    add("clear", np.arange(200) < 195)
    (point,) = [p for p in points(result) if p.asked == 0.3]
    fair = apart(result, key_of(point.ours), point.others, resamples=50)
    assert fair.other_lost == pytest.approx(point.other_lost) and fair.difference.standing == "behind"


@pytest.mark.parametrize("metric", ["spearman", "top1", "matthews", "perplexity"])
def test_a_score_by_counts_is_that_of_repeated_examples(metric):
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 2 if metric == "matthews" else 6, (40, 2)).astype(float) + (metric == "perplexity")
    rows = rows[:, 0] if metric == "top1" else rows
    often = generator.integers(0, 4, 40)
    expected = SCORES[metric][0](np.repeat(rows, often, axis=0))
    assert counted(metric, rows)(often.astype(float)) == pytest.approx(expected)


def test_a_best_other_that_loses_nothing_is_reported_without_a_share(tmp_path: Path) -> None:
    told = full(made_up(tmp_path / "r.json", spp=170, obs=180, fisher=100))
    assert "The one other that loses least over all sizes is obs" in told
    assert "of which ours loses" not in told and "nan" not in told
    assert "|  |" in in_short([made_up(tmp_path / "r.json", spp=170, obs=180, fisher=100)])


def test_two_plans_are_compared_by_their_metric_over_the_same_examples() -> None:
    from bench.studies.judging import metric_difference

    generator = np.random.default_rng(3)
    scores = generator.normal(size=200)
    near = np.stack([scores + 0.1 * generator.normal(size=200), scores], 1)
    far = np.stack([scores + 2.0 * generator.normal(size=200), scores], 1)
    found = metric_difference("spearman", near, far)
    assert found["unit"] == "points" and 0 < found["low"] < found["difference"] < found["high"] < 100
    assert found["difference"] == pytest.approx(found["ours"] - found["rival"])
    same = metric_difference("spearman", near, near)
    assert (same["low"], same["difference"], same["high"]) == (0, 0, 0)
    texts = np.stack([np.full(8, 30.0), np.full(8, 10.0)], 1)  # nats of tokens, tokens
    better = metric_difference("perplexity", texts, texts + np.array([5.0, 0.0]))
    assert better["unit"] == "nats" and better["difference"] == pytest.approx(0.5)
    agreeing = np.stack([np.full(8, 6.0), np.full(8, 10.0)], 1)  # tokens that agree, tokens
    found = metric_difference("agreement", agreeing, agreeing - np.array([1.0, 0.0]))
    assert (found["ours"], found["difference"]) == (pytest.approx(0.6), pytest.approx(0.1))
