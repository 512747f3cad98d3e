"""`export.variant: auto`: the standard form stays unless the other is measurably faster where the recipe times it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from bench.stats import Ratio
from deploy_prune.pipeline.variant import CANDIDATES, choose, verdict_of
from deploy_prune.recipe import load_recipe


@dataclass
class Report:
    """A cell in which `ort` took `value` of the time of `standard`."""

    value: float
    verdict: str

    def __getitem__(self, name):
        assert name == "ort"
        return SimpleNamespace(ratio=Ratio(self.value, self.value, self.value), verdict=self.verdict)


FASTER, SLOWER, SAME = Report(0.8, "faster"), Report(1.2, "slower"), Report(0.97, "no measurable change")


@pytest.mark.parametrize(
    ("cells", "chosen"),
    [
        ([FASTER], "ort"),
        ([SAME], "standard"),
        ([FASTER, FASTER, SAME], "ort"),
        ([FASTER, SAME], "standard"),  # not in most cells
        ([FASTER, SLOWER], "standard"),
    ],
)
def test_ort_is_chosen_where_it_is_measurably_faster_in_most_cells(cells, chosen):
    got, why = verdict_of(cells)
    assert got == chosen
    assert "time of ort over standard by cell" in why


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("bench.runtimes=[openvino]", "openvino knows standard operators alone"),
        ("bench.enabled=false", "nothing is timed"),
    ],
)
def test_nothing_is_exported_where_there_is_no_choice(change, why, tmp_path):
    setup = SimpleNamespace(recipe=load_recipe("digits", [change, "export.variant=auto"]))
    found = choose(setup, tmp_path)
    assert found["chosen"] == CANDIDATES[0] == "standard" and why in found["why"]
    assert not list(tmp_path.iterdir())
