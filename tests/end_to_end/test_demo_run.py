"""The demo as shipped: what the README promises of it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from deploy_prune.cli.main import run_command
from deploy_prune.plan import PrunePlan
from deploy_prune.release.manifest import Manifest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_leaves_a_nested_verified_family_within_two_points_at_30_percent(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    assert run_command(["demo", "--out", str(out)]) == 0
    assert run_command(["verify", str(out)]) == 0
    manifest = Manifest.load(out / "manifest.json")
    dense, *members = manifest.members
    assert len(members) >= 5
    plans = [PrunePlan.load(out / str(member.plan)) for member in members]
    assert all(small.is_nested_in(large) for large, small in itertools.pairwise(plans))
    s30 = next(member for member in members if member.name == "s30")
    assert dense.quality is not None and s30.quality is not None
    assert s30.quality.value >= dense.quality.value - 0.02
    for member in members:
        assert member.achieved is not None
        assert dense.weight_bytes - member.weight_bytes == 4 * (manifest.base.parameters - member.achieved.params)
        assert len(member.latency) == 2
