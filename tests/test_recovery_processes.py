"""Two processes recover what one does, up to rounding, also with weights spread over both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_processes

from deploy_prune.methods.compute import Compute


def trained(compute: Compute) -> dict[str, Any]:
    import deploy_prune as dp
    from deploy_prune.demo import digits_vit
    from deploy_prune.recovery import recover
    from deploy_prune.tasks import load_task

    dense = digits_vit(epochs=1)
    task = load_task(
        "image-classification", model=dense, model_ref="python:x:y", calibration="digits:train", evaluation=None
    )
    small = dp.compact(dense, dp.search(dense, task, "magnitude", examples=64).plan(0.5))
    # Hidden states are weighed within a process's own share; their loss would not be the mean of two.
    found = recover(
        small,
        task,
        teacher=dense,
        compute=compute,
        hidden_weight=0.0,
        ema=0.5,
        examples=100,
        steps=6,
        evaluations=2,
        batch_size=16,
        patience=None,
        precision="fp32",
    )
    weights = {name: p.detach().numpy() for name, p in found.model.named_parameters()}
    return {"marks": [(mark.step, mark.value, mark.loss) for mark in found.marks], "weights": weights}


def everything() -> dict[str, Any]:
    return {
        "plain": trained(Compute()),
        "pieces": trained(Compute(micro_batch=3)),
        "sharded": trained(Compute(shard=True, activation_checkpointing=True)),
    }


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    alone = trained(Compute())
    first, second = run_processes(2, everything, tmp_path)
    for name, found in first.items():
        for key, value in found["weights"].items():
            assert np.array_equal(value, second[name]["weights"][key]), (name, key)
        losses = [[mark[2] for mark in marks] for marks in (found["marks"], alone["marks"])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3), name
        assert found["marks"][-1][2] < found["marks"][0][2]
        far = max(float(np.abs(value - alone["weights"][key]).max()) for key, value in found["weights"].items())
        assert far < 1e-3, name
    assert torch.distributed.is_initialized() is False
