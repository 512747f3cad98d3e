"""The table of a diff study: means of the seeds there are, each seed, and nothing for what was not run."""

from __future__ import annotations

from bench.studies.diff_report import table


def test_cells_hold_the_mean_and_every_seed_and_what_was_not_run_is_empty() -> None:
    values = {"SST-2/full/1": 0.8, "SST-2/full/0": 0.9, "STS-B/l0/2": 0.5}
    assert table({key: {"value": value} for key, value in values.items()}).splitlines() == [
        "| task | full | l0 |",
        "|---|---|---|",
        "| SST-2, accuracy | 85.0 (90.0, 80.0) |  |",
        "| STS-B, spearman |  | 50.0 (50.0) |",
    ]
