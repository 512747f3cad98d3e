"""The diff study keeps what it has when a fit fails, and refuses rows of other terms."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench.studies import diff
from deploy_prune.errors import DeployPruneError, UsageError
from deploy_prune.files import write_json


def test_rows_are_kept_when_another_fit_fails_and_the_failed_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(name: str) -> dict[str, Any]:
        if name == "bad":
            raise MemoryError("out of memory")
        return {"value": 1.0}

    monkeypatch.setattr(diff, "_row", row)
    kept: dict[str, Any] = {}
    with ThreadPoolExecutor(1) as pool, pytest.raises(DeployPruneError, match="1 of 3 fits failed") as caught:
        diff.collect(pool, {key: {"name": key} for key in ("one", "bad", "two")}, kept.__setitem__)
    assert set(kept) == {"one", "two"}
    assert "bad: MemoryError" in str(caught.value)


def test_an_interrupted_study_drops_what_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(name: str) -> dict[str, Any]:
        return {"value": 1.0}

    def stop(key: str, row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    class Pool(ThreadPoolExecutor):
        dropped = False

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            self.dropped = self.dropped or cancel_futures
            super().shutdown(wait=wait, cancel_futures=cancel_futures)

    monkeypatch.setattr(diff, "_row", row)
    with Pool(1) as pool, pytest.raises(KeyboardInterrupt):
        diff.collect(pool, {"one": {"name": "one"}}, stop)
    assert pool.dropped


def test_rows_of_other_terms_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPLOY_PRUNE_DATA", str(tmp_path))
    out = tmp_path / "study.json"
    write_json(out, {"terms": diff.terms_of(0.005, 64, None, {}, False), "rows": {}, "environments": {}})
    found = CliRunner().invoke(diff.main, ["--out", str(out)])
    assert isinstance(found.exception, UsageError) and "other terms" in str(found.exception)
