"""README's table of families says what the suite's registry and adapters say."""

from __future__ import annotations

import inspect
import re

import test_families_ship
import test_forms_agree
from forms import FAMILIES
from support_table import rows, written


def test_readme_lists_every_family_with_its_units_and_all_checks() -> None:
    functions = [f for m in (test_forms_agree, test_families_ship) for n, f in vars(m).items() if n.startswith("test_")]
    checks = sum(1 for f in functions if {"family", "cut"} & set(inspect.signature(_inner(f)).parameters))
    assert [re.sub(r" +", " ", row) for row in written()] == rows(dict.fromkeys(FAMILIES, checks)), (
        "run: python tests/support_table.py"
    )


def _inner(function):
    """The function under hypothesis's wrapper, which hides the parameters it fills."""
    return getattr(getattr(function, "hypothesis", None), "inner_test", function)
