"""README's table of families, written from the results of the suite: `python tests/support_table.py`.

Every row is a family of `forms.FAMILIES`; its units are those its adapter finds in the tiny model, its checks those of
CHECKS that ran on it. Nothing is written unless all of them passed.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from forms import FAMILIES

ROOT = Path(__file__).parents[1]
CHECKS = ("tests/test_forms_agree.py", "tests/test_families_ship.py")
BEGIN, END = "<!-- families: written by tests/support_table.py -->", "<!-- families end -->"


class Results:
    """A pytest plugin that counts, for each family, the checks that passed and those that did not."""

    def __init__(self) -> None:
        self.passed: dict[str, int] = defaultdict(int)
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        family = report.nodeid.rpartition("[")[2].rstrip("]").split("-")[0]
        if family in FAMILIES and report.when == "call" and report.passed:
            self.passed[family] += 1
        elif report.failed or report.skipped:
            self.failed.append(report.nodeid)


def rows(checks: dict[str, int]) -> list[str]:
    """One line of Markdown for every family."""
    return [
        f"| {family.covers} | {family.library} | {units_of(name)} | {checks[name]} |"
        for name, family in FAMILIES.items()
    ]


def units_of(name: str) -> str:
    """Which kinds the family's adapter offers, and why it does not offer another."""
    from deploy_prune.adapters import find_sites

    sites = find_sites(build(name))
    kinds = list(dict.fromkeys(kind.value for site in sites for kind in site.counts))
    limits = {kind.value: why for site in sites for kind, why in (site.limits or {}).items()}
    return ", ".join(kinds) + "".join(f"; no {kind}: {why}" for kind, why in limits.items())


def build(name: str) -> Any:
    """The tiny model that the fixture `name` gives."""
    import conftest

    fixture = getattr(conftest, name)
    return (getattr(fixture, "__wrapped__", None) or fixture.__pytest_wrapped__.obj)()


def written() -> list[str]:
    """The rows that README has now."""
    text = (ROOT / "README.md").read_text()
    return text[text.index(BEGIN) : text.index(END)].splitlines()[3:]


def main() -> int:
    results = Results()
    code = pytest.main(["-q", "-p", "no:cacheprovider", *(str(ROOT / file) for file in CHECKS)], plugins=[results])
    if code or results.failed:
        print("not written: " + ", ".join(results.failed[:5]), file=sys.stderr)
        return 1
    head = ["| family | library | units | checks passed |", "|---|---|---|---|"]
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    readme.write_text(before + "\n".join([BEGIN, *head, *rows(results.passed)]) + "\n" + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
