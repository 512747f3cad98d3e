"""Work is counted from what ran, ceilings from what was measured, and a model that is not faster gets its reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from onnx_models import save_mlp

from bench.inputs import graph_inputs, make_inputs
from bench.roofline import Ceilings, measure_ceilings, reasons
from bench.work import Work, count, flops_of, work_of
from deploy_prune.cli.main import run_command
from deploy_prune.errors import DeployPruneError

DENSE = Work(1_000_000, 400_000, {"MatMul": 10, "LayerNormalization": 4}, 0.0)
HIGH = Ceilings("ort-cpu", "a CPU", 1, 1e9, 1e9, 1e-6)


def test_products_of_a_graph_are_counted_as_two_operations_each(tmp_path: Path) -> None:
    file = save_mlp(tmp_path / "mlp.onnx", 8)
    work = work_of(file, make_inputs(graph_inputs(file), batch=5))
    assert work.flops == 2 * 5 * (4 * 8 + 8 * 3)
    assert work.unaligned == 1.0  # widths 4 and 3
    assert work.nodes >= 3


@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "flops"),
    [
        ("MatMul", [(2, 5, 16), (16, 32)], [(2, 5, 32)], 2 * 2 * 5 * 16 * 32),
        ("Gemm", [(5, 16), (32, 16), (32,)], [(5, 32)], 2 * 5 * 16 * 32),
        ("Gemm", [(16, 5), (16, 32)], [(5, 32)], 2 * 5 * 16 * 32),
        ("Conv", [(1, 3, 8, 8), (6, 3, 2, 2)], [(1, 6, 4, 4)], 2 * 6 * 16 * 12),
        ("Attention", [(2, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 16)], [(2, 4, 7, 16)], 2 * 2 * 4 * 7 * 9 * (8 + 16)),
        ("MultiHeadAttention", [(2, 7, 32), (2, 9, 32), (2, 9, 16)], [(2, 7, 16)], 2 * 2 * 7 * 9 * (32 + 16)),
        ("Attention", [(2, 7, 32), (32, 96), (96,)], [(2, 7, 32)], 2 * 2 * 7 * 32 * 96 + 4 * 2 * 7 * 7 * 32),
        ("Softmax", [(2, 7)], [(2, 7)], 0),
    ],
)
def test_operations_follow_the_shapes_that_occurred(op: str, inputs: Any, outputs: Any, flops: int) -> None:
    assert flops_of(op, inputs, outputs) == flops


def test_bytes_count_every_tensor_as_often_as_it_is_used() -> None:
    event = {
        "cat": "Node",
        "name": "a_kernel_time",
        "args": {
            "op_name": "Add",
            "input_type_shape": [{"float": [4]}, {"int64": [2]}],
            "output_type_shape": [{"float16": [4]}],
        },
    }
    assert count([event, event, {"cat": "Session", "name": "x"}]) == Work(0, 2 * (16 + 16 + 8), {"Add": 2}, 0.0)


def test_measured_ceilings_are_positive_and_say_where() -> None:
    ceilings = measure_ceilings("ort-cpu", threads=1, side=64, length=1 << 14)
    assert ceilings.flops > 0 and ceilings.bytes > 0 and ceilings.dispatch > 0
    assert ceilings.runtime == "ort-cpu" and ceilings.device


def test_a_runtime_without_onnx_files_has_no_ceilings() -> None:
    with pytest.raises(DeployPruneError):
        measure_ceilings("torch-cpu", threads=1, side=8, length=8)


@pytest.mark.parametrize(
    ("own", "seconds", "word"),
    [
        (Work(10_000, 1_000, {"Add": 900, "LayerNormalization": 4}, 0.0), 1e-3, "launch-bound"),
        (Work(100_000, 900_000, {"MatMul": 10, "LayerNormalization": 4}, 0.0), 1e-3, "memory-bound"),
        (replace(DENSE, flops=500_000, unaligned=0.9), 0.1, "unaligned"),
        (Work(900_000, 1_000, {"MatMul": 10, "Sub": 9}, 0.0), 0.1, "lost fusion: LayerNormalization 4 to 0"),
        (replace(DENSE, flops=990_000), 0.1, "hardly less work"),
    ],
)
def test_each_cause_is_named(own: Work, seconds: float, word: str) -> None:
    assert reasons(own, DENSE, seconds, HIGH)[0].startswith(word)


def test_a_model_that_computes_less_without_any_fault_has_no_reason() -> None:
    assert reasons(replace(DENSE, flops=500_000), DENSE, 0.1, HIGH) == []


def test_bench_says_why_a_model_is_no_faster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.timing.MIN_ROUNDS", 4)
    monkeypatch.setattr("bench.roofline.SIDE", 32)
    monkeypatch.setattr("bench.roofline.LENGTH", 1 << 12)
    files = [str(save_mlp(tmp_path / f"{name}.onnx", 8)) for name in ("dense", "same")]
    assert run_command(["bench", *files, "--seconds", "0.001", "--threads", "1", "--why", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["rooflines"]
    assert set(found["models"]) == {"dense", "same"}
    assert found["models"]["same"]["flops"] == found["models"]["dense"]["flops"] > 0
