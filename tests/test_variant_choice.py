"""`export.variant: auto`: the standard form stays unless another is measurably faster where the recipe times it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from bench.stats import Ratio
from deploy_prune.pipeline import making, variant
from deploy_prune.pipeline.variant import choose, verdict_of
from deploy_prune.recipe import load_recipe


@dataclass
class Cell:
    """How long `ort` and `plain` took, of the time of `standard`, and the verdicts."""

    ort: tuple[float, str]
    plain: tuple[float, str] = (1.0, "no measurable change")

    def __getitem__(self, name):
        value, verdict = getattr(self, name)
        return SimpleNamespace(ratio=Ratio(value, value, value), verdict=verdict)


FASTER, SLOWER, SAME = (0.8, "faster"), (1.2, "slower"), (0.97, "no measurable change")
FASTEST = (0.7, "faster")


@pytest.mark.parametrize(
    ("cells", "chosen"),
    [
        ([Cell(FASTER)], "ort"),
        ([Cell(SAME)], "standard"),
        ([Cell(FASTER), Cell(FASTER), Cell(SAME)], "ort"),
        ([Cell(FASTER), Cell(SAME)], "standard"),  # not in most cells
        ([Cell(FASTER), Cell(SLOWER)], "standard"),
        ([Cell(FASTER, FASTEST)], "plain"),
        ([Cell(FASTEST, FASTER)], "ort"),
        ([Cell(SLOWER, FASTER)], "plain"),
        ([Cell(FASTER, FASTEST), Cell(FASTER, SAME)], "ort"),  # plain not in most cells
    ],
)
def test_the_fastest_of_what_is_measurably_faster_in_most_cells_is_chosen(cells, chosen):
    got, why = verdict_of(cells, ["ort", "plain"])
    assert got == chosen
    assert "time of ort over standard by cell" in why and "time of plain over standard" in why


def test_nothing_is_exported_where_nothing_is_timed(tmp_path):
    setup = SimpleNamespace(recipe=load_recipe("digits", ["bench.enabled=false", "export.variant=auto"]))
    found = choose(setup, tmp_path)
    assert found["chosen"] == "standard" and "nothing is timed" in found["why"]
    assert not list(tmp_path.iterdir())


def test_a_runtime_that_knows_standard_operators_alone_is_not_offered_others(tmp_path, monkeypatch):
    setup = SimpleNamespace(
        recipe=load_recipe("digits", ["bench.runtimes=[openvino]", "export.variant=auto"]), model=None
    )
    written = []
    monkeypatch.setattr(making, "export", lambda *_, variant: written.append(variant))
    cell = Cell(FASTEST)
    cell.to_json = dict
    monkeypatch.setattr(variant, "time_family", lambda *_: [cell])
    found = choose(setup, tmp_path)
    assert written == ["standard", "plain"] and found["chosen"] == "standard"
    assert "openvino knows standard operators alone" in found["why"]
