"""The ratio rule made exact: the asked amount is met to one unit, whatever the importances."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_prune.errors import UsageError
from deploy_prune.methods.layer_ratios import normalised, removal_ratios, removed_units

RAW = st.one_of(
    st.just(0.0),
    st.floats(0, 1),
    st.floats(0, 1e300),
    st.floats(0, 1e-300),
)
LAYERS = st.lists(st.tuples(RAW, st.integers(1, 200)), min_size=1, max_size=40)
POWERS = st.sampled_from((0.25, 1.0, 2.0, 8.0))


@settings(max_examples=1000, deadline=None)
@given(layers=LAYERS, power=POWERS, amount=st.floats(0, 1), more=st.floats(0, 1))
def test_the_asked_amount_is_met_to_one_unit_for_any_importances(layers, power, amount, more):
    raw, units = (np.array(column) for column in zip(*layers, strict=True))
    own = normalised(raw, power)
    asked = round(amount * units.sum())
    removed = removed_units(own, units, asked)
    assert removed.sum() == asked and (removed >= 0).all() and (removed <= units).all()
    ratios = removal_ratios(own, units, amount)
    assert (ratios >= 0).all() and (ratios <= 1).all()
    assert ratios @ units == pytest.approx(amount * units.sum(), rel=1e-9, abs=1e-9)
    larger = min(1.0, amount + more)
    assert (removal_ratios(own, units, larger) >= ratios - 1e-9).all()
    assert (removed_units(own, units, round(larger * units.sum())) >= removed).all()


def test_without_a_full_layer_the_ratios_are_those_of_the_rule():
    own = np.array([0.0, 0.2, 0.5, 1.0])
    rule = 0.3 * (1 - own) / (1 - own).sum() * len(own)
    assert rule.max() <= 1
    assert removal_ratios(own, np.full(4, 10.0), 0.3) == pytest.approx(rule)


def test_what_a_full_layer_cannot_give_is_taken_from_the_others_in_proportion():
    found = removal_ratios([0.0, 0.5, 0.75], [1, 1, 1], 0.7)  # the rule says 1.2, 0.6, 0.3
    assert found == pytest.approx([1.0, 1.1 * 2 / 3, 1.1 / 3])


def test_corners():
    equal = removal_ratios(normalised([3.0, 3.0, 3.0]), [5, 10, 20], 0.4)
    assert equal == pytest.approx([0.4] * 3)
    assert removal_ratios(normalised([0.0, 0.0]), [1, 1], 0.5) == pytest.approx([0.5, 0.5])
    one_dominant = normalised([1e9, 1e-9, 1e-9])
    assert removal_ratios(one_dominant, [1, 1, 1], 0.5) == pytest.approx([0, 0.75, 0.75])
    assert removal_ratios(one_dominant, [1, 1, 1], 0.9) == pytest.approx([0.7, 1, 1])  # it gives when others cannot
    assert removal_ratios([1.0, 1.0], [1, 3], 0.25) == pytest.approx([0.25, 0.25])
    assert removal_ratios([0.3], [7], 1.0) == pytest.approx([1.0])
    assert removal_ratios([0.3, 0.2], [7, 1], 0.0) == pytest.approx([0.0, 0.0])


@pytest.mark.parametrize("raw", [[1.0, float("nan")], [float("inf"), 1.0], [-1.0, 1.0]])
def test_importances_that_are_none_are_refused(raw):
    with pytest.raises(UsageError, match="finite"):
        normalised(raw)
    with pytest.raises(UsageError):
        removal_ratios(raw, [1, 1], 0.5)


def test_impossible_requests_are_refused():
    with pytest.raises(UsageError, match="importance_power"):
        normalised([1.0, 2.0], 0.0)
    with pytest.raises(UsageError, match="no layer"):
        normalised([])
    with pytest.raises(UsageError, match="amount"):
        removal_ratios([0.5], [1], 1.5)
    with pytest.raises(UsageError, match="amount"):
        removed_units([0.5], [3], 4)
