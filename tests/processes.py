"""Several processes on this machine that meet over gloo, as a launcher would start them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau


def run_processes(count: int, work: Callable[..., Any], directory: Path, *arguments: Any) -> list[Any]:
    """`work(*arguments)` in `count` processes; what each returned. `work` must be a function of a test module."""
    import torch

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_process, (count, port, work, directory, arguments), nprocs=count)
    # Written by `_process` a moment ago, and any Python object.
    return [torch.load(directory / f"{i}.result", weights_only=False) for i in range(count)]


def assert_same_path(path: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Rounding may let two units change places whose importance differs in the last digits."""
    found, wanted = assert_same_order(path, expected)
    assert (np.abs(found - wanted) < 1e-2).mean() > 0.99


def assert_same_order(
    path: dict[str, np.ndarray], expected: dict[str, np.ndarray], least: float = 0.999
) -> list[np.ndarray]:
    """All scores of both, which rank units alike but for rounding."""
    assert path.keys() == expected.keys()
    both = [np.concatenate([scores[key].ravel() for key in expected]) for scores in (path, expected)]
    assert kendalltau(*both).statistic > least
    return both


def _process(
    index: int, count: int, port: int, work: Callable[..., Any], directory: Path, arguments: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(index),
        LOCAL_RANK=str(index),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    from deploy_prune import distributed

    torch.set_num_threads(1)
    distributed.start()
    torch.save(work(*arguments), directory / f"{index}.result")
    distributed.finish()
