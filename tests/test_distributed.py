"""Two processes find what one finds; a failure is told everywhere; weights may be spread over both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import assert_same_path, run_processes

from deploy_prune import distributed
from deploy_prune.adapters import find_sites
from deploy_prune.errors import ArtifactError, UsageError
from deploy_prune.methods import placed
from deploy_prune.methods.compute import Compute, parts
from deploy_prune.moment_groups import collect_to
from deploy_prune.refitting import load_moments

EXAMPLES = 49  # the last of the batches of 16 holds one example: nothing for the second process


def digits() -> tuple[Any, Any]:
    from deploy_prune.demo import digits_vit_untrained
    from deploy_prune.tasks import load_task

    torch.manual_seed(0)
    model = digits_vit_untrained()
    task = load_task(
        "image-classification", model=model, model_ref="python:x:y", calibration="digits:train", evaluation=None
    )
    return model, task


def found(method: str, compute: Compute, **options: Any) -> dict[str, np.ndarray]:
    from deploy_prune.methods import search

    model, task = digits()
    path = search(
        model, task, method, examples=EXAMPLES, batch_size=16, precision="fp32", compute=compute, **options
    )  # fmt: skip
    return {key: np.asarray(scores) for key, scores in path.scores.items()}


ITERATED: dict[str, Any] = {"steps": 12, "objective": "distill", "basis": "own", "stages": []}


def moments_in(directory: Path, compute: Compute, limit: float) -> dict[str, Any]:
    """Tokens weighted by the loss's gradient, so that a pass backward is part of it."""
    model, task = digits()
    sites = find_sites(model)
    order = task.calibration_order(task.calibration_items(EXAMPLES), 16)
    with placed(model, sites, compute) as ready, torch.no_grad():
        collect_to(directory, ready, sites, task, order, limit=limit, losses=task.calibration_losses(), compute=compute)
    distributed.all_gather(None)  # the file of the last group is there
    return {name: (m.count, m.mean, m.second) for name, m in load_moments(directory).items()}


def everything(directory: Path) -> dict[str, Any]:
    results: dict[str, Any] = {
        "moments": moments_in(directory / "moments", Compute(micro_batch=5), 1e6),
        "moments sharded": moments_in(directory / "sharded", Compute(shard=True), 1e9),
        "spp": found("spp", Compute(), **ITERATED),
        "fisher": found("fisher", Compute()),
        "spp sharded": found("spp", Compute(shard=True, micro_batch=3, activation_checkpointing=True), **ITERATED),
        "fisher principal": found("fisher", Compute(shard=True, micro_batch=5), basis="principal"),
        "magnitude sharded": found("magnitude", Compute(shard=True)),
    }
    own = {"both": torch.full((2,), 1.0 + distributed.index()), f"only {distributed.index()}": torch.ones(1)}
    results["reduced"] = distributed.reduce(own)
    results["gathered"] = distributed.all_gather(distributed.index())
    for name, call in {
        "told": lambda: distributed.from_main(refuse),
        "differ": lambda: distributed.require_same("numbers", distributed.index(), "Agree."),
    }.items():
        try:
            call()
        except (ArtifactError, UsageError) as error:
            results[name] = f"{type(error).__name__}: {error.what}"
    return results


def refuse() -> None:
    assert distributed.is_main()
    raise ArtifactError("damaged", where="a file")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("two")
    return run_processes(2, everything, directory, directory)


@pytest.mark.parametrize("method", ["spp", "fisher"])
def test_two_processes_find_the_path_of_one(two: list[dict[str, Any]], method: str) -> None:
    assert_same_path(two[0][method], found(method, Compute(), **(ITERATED if method == "spp" else {})))


def test_sharded_weights_in_small_pieces_find_the_same_path(two: list[dict[str, Any]]) -> None:
    assert_same_path(two[0]["spp sharded"], found("spp", Compute(), **ITERATED))
    assert_same_path(two[0]["magnitude sharded"], found("magnitude", Compute()))
    assert_same_path(two[0]["fisher principal"], found("fisher", Compute(), basis="principal"))


@pytest.mark.parametrize("how", ["moments", "moments sharded"])
def test_two_processes_find_the_moments_of_one(two: list[dict[str, Any]], how: str, tmp_path: Path) -> None:
    expected = moments_in(tmp_path, Compute(), 1e9)
    assert two[0][how].keys() == expected.keys() == two[1][how].keys()
    for name, (count, mean, second) in expected.items():
        found_count, found_mean, found_second = two[0][how][name]
        assert found_count == count
        torch.testing.assert_close(found_mean, mean, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found_second, second, rtol=1e-5, atol=1e-7)


def test_all_processes_hold_the_same_bits(two: list[dict[str, Any]]) -> None:
    for name in ("spp", "fisher", "spp sharded"):
        for key, scores in two[0][name].items():
            assert np.array_equal(scores, two[1][name][key])


def test_a_process_without_a_key_adds_nothing_to_its_sum(two: list[dict[str, Any]]) -> None:
    for result in two:
        assert {key: t.tolist() for key, t in result["reduced"].items()} == {
            "both": [3.0, 3.0],
            "only 0": [1.0],
            "only 1": [1.0],
        }
        assert result["gathered"] == [0, 1]


def test_what_the_main_process_refuses_all_refuse(two: list[dict[str, Any]]) -> None:
    for result in two:
        assert result["told"] == "ArtifactError: damaged"
        assert result["differ"] == "UsageError: processes disagree about numbers"


def test_pieces_of_a_batch_hold_every_item_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (1, 2, 3, 5):
        monkeypatch.setattr(distributed, "count", lambda count=count: count)
        for micro_batch in (None, 1, 2, 7):
            shares = []
            for index in range(count):
                monkeypatch.setattr(distributed, "index", lambda index=index: index)
                shares.append(list(parts(range(4), Compute(micro_batch, shard=True))))
            counted = [item for share in shares for part in share if part.counts for item in part.items]
            assert sorted(counted) == [0, 1, 2, 3]
            assert len({len(share) for share in shares}) == 1, "with sharded weights all take equally many steps"


def test_a_launcher_setting_that_would_be_ignored_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UsageError, match="deepspeed") as refused:
        distributed.start()
    assert len(refused.value.problems) == 2


def test_a_command_for_one_process_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from deploy_prune.cli.main import run_command

    monkeypatch.setenv("WORLD_SIZE", "2")
    for process, told in ("0", True), ("1", False):
        monkeypatch.setenv("RANK", process)
        assert run_command(["verify", "somewhere"]) == 2
        assert ("`verify` runs in one process" in capsys.readouterr().err) == told
