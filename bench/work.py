"""What a graph does in one call: operations, bytes and nodes, read from a profiled run of ONNX Runtime on the CPU.

Shapes in a profile are those that really occurred, so that every variant of an export is counted alike, fused or not.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from deploy_prune.files import scratch_directory

if TYPE_CHECKING:
    import numpy as np

BYTES = {"float": 4, "float16": 2, "double": 8, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}
Shape = tuple[int, ...]
_QUANTISED = ("MatMulInteger", "DynamicQuantizeMatMul", "MatMulNBits")
_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm")
# Operators that are several of the exported graph's in one.
FUSED = frozenset(
    (
        *("Attention", "MultiHeadAttention", "GroupQueryAttention", "RotaryEmbedding", "BiasSoftmax"),
        *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "EmbedLayerNormalization"),
        *("LayerNormalization", "SimplifiedLayerNormalization", "BiasGelu", "FastGelu", "Gelu", "QuickGelu"),
        *("FusedMatMul", "FusedGemm", "FusedConv"),
    )
)


@dataclass(frozen=True)
class Work:
    """One call. `flops` counts a multiply-accumulate as two; `bytes` what the nodes read and write in all, each tensor
    as often as it is used; `operators` how often each ran; `unaligned` the share of the flops in products with an inner
    or outer width that is no multiple of `ALIGN`."""

    flops: int
    bytes: int
    operators: Mapping[str, int]
    unaligned: float

    @property
    def nodes(self) -> int:
        return sum(self.operators.values())

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / max(1, self.bytes)


ALIGN = 8  # fp32 values in half a vector of AVX-512: kernels fall to their edge cases below a multiple of it


def work_of(onnx: Path | str, inputs: Mapping[str, np.ndarray]) -> Work:
    """Run `onnx` once on the CPU provider, all optimisations on. Raises as the ort-cpu runtime."""
    return count(_events(onnx, inputs, 1))


def time_by_operator(onnx: Path | str, inputs: Mapping[str, np.ndarray], runs: int = 20) -> dict[str, float]:
    """Milliseconds of one call by operator, by ONNX Runtime's own profile on one thread: each node's median of `runs`,
    summed; the largest first. What lies between nodes is not in it. Raises as the ort-cpu runtime."""
    nodes: dict[tuple[str, str], list[float]] = {}
    for event in _events(onnx, inputs, runs):
        if _is_kernel(event):
            nodes.setdefault((event["args"]["op_name"], event["name"]), []).append(event["dur"] / 1000)
    found: Counter[str] = Counter()
    for (operator, _), times in nodes.items():
        found[operator] += median(times)  # type: ignore[assignment]
    return dict(found.most_common())


def _events(onnx: Path | str, inputs: Mapping[str, np.ndarray], runs: int) -> list[dict[str, Any]]:
    """What ONNX Runtime notes of a few calls on one thread."""
    from bench.runtimes.ort import create
    from bench.runtimes.ort_cpu import PROVIDER, session_options

    with scratch_directory() as directory:
        options = session_options(1)
        options.enable_profiling, options.profile_file_prefix = True, str(directory / "profile")
        session = create(Path(onnx), [(PROVIDER, {})], options)
        for _ in range(runs):
            session.run(None, dict(inputs))
        return list(json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")))


def _is_kernel(event: Mapping[str, Any]) -> bool:
    return event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time")


def count(events: Iterable[Mapping[str, Any]]) -> Work:
    """The work in the events of an ORT profile of one run."""
    flops = moved = unaligned = 0
    operators: Counter[str] = Counter()
    for event in events:
        args = event.get("args", {})
        if not _is_kernel(event):
            continue
        inputs, outputs = (_shapes(args.get(f"{side}_type_shape", ())) for side in ("input", "output"))
        operators[args["op_name"]] += 1
        if args["op_name"] in _PRODUCTS and len(inputs) == 1:  # a weight packed beforehand is not in the profile
            inputs.append(("float", (inputs[0][1][-1], outputs[0][1][-1])))
        own = flops_of(args["op_name"], [shape for _, shape in inputs], [shape for _, shape in outputs])
        flops += own
        moved += sum(BYTES.get(kind, 4) * math.prod(shape) for kind, shape in (*inputs, *outputs))
        if args["op_name"] == "MatMulNBits" and outputs:
            moved += _packed_bytes(inputs, outputs)
            widths = [inputs[0][1][-1], outputs[0][1][-1]]
        else:
            widths = _widths(args["op_name"], [shape for _, shape in inputs])
        if own and any(width % ALIGN for width in widths):
            unaligned += own
    return Work(flops, moved, dict(operators), unaligned / max(1, flops))


def _packed_bytes(inputs: list[tuple[str, Shape]], outputs: list[tuple[str, Shape]]) -> int:
    """Bytes of a weight in blocks, which is packed beforehand and not in the profile: 8 bits, or with zero points 4."""
    from converters.precision.blocks import BLOCK

    bits = 4 if any(kind == "uint8" for kind, _ in inputs) else 8
    return outputs[0][1][-1] * -(-inputs[0][1][-1] // BLOCK) * BLOCK * bits // 8


def flops_of(op: str, inputs: list[Shape], outputs: list[Shape]) -> int:
    """Operations of matrix products, convolutions and attention; other operators are counted by their bytes alone."""
    if op in ("MatMul", "FusedMatMul", *_QUANTISED) and outputs and inputs[0]:
        return 2 * math.prod(outputs[0]) * inputs[0][-1]
    if op in ("Gemm", "FusedGemm") and outputs:
        inner = math.prod(inputs[0]) // max(1, outputs[0][0])
        return 2 * math.prod(outputs[0]) * inner
    if op in ("Conv", "FusedConv", "ConvInteger") and outputs:
        return 2 * math.prod(outputs[0]) * math.prod(inputs[1][1:])
    if op in ("Attention", "MultiHeadAttention", "GroupQueryAttention") and outputs:
        return _attention(op, inputs, outputs)
    return 0


def _attention(op: str, inputs: list[Shape], outputs: list[Shape]) -> int:
    """2 B S T (width of the queries + width of the outputs), all heads together; plus the projection, where the
    operator (ONNX Runtime's own Attention) has it inside."""
    query, out = inputs[0], outputs[0]
    if len(query) == 4:  # (batch, heads, positions, width)
        b, h, s, d = query
        return 2 * b * h * s * inputs[1][2] * (d + out[-1])
    if len(query) != 3:
        return 0
    b, s, d = query
    if op == "Attention" and len(inputs) > 1 and len(inputs[1]) == 2:  # input and packed weights (hidden, 3 width)
        return 2 * b * s * d * inputs[1][1] + 4 * b * s * s * out[-1]
    keys = inputs[1][1] if len(inputs) > 1 and len(inputs[1]) >= 3 else s
    return 2 * b * s * keys * (d + out[-1])


def _widths(op: str, inputs: list[Shape]) -> list[int]:
    """Inner and outer widths of a product with a weight (two dimensions); positions are not widths."""
    weight = inputs[1] if len(inputs) > 1 and op in _PRODUCTS else ()
    return list(weight) if len(weight) == 2 else []


def _shapes(told: Iterable[Mapping[str, list[int]]]) -> list[tuple[str, Shape]]:
    return [(kind, tuple(shape)) for tensor in told for kind, shape in tensor.items()]
