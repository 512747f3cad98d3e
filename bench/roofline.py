"""The ceilings of a runtime on a device, measured there, and which of them holds a model down.

    time ≥ max(flops / peak, bytes / bandwidth),    and nodes × dispatch when nodes are too small to matter otherwise

(Williams, Waterman and Patterson, Roofline, CACM 52(4), 2009.) The peak is that of one large matrix product, the
bandwidth that of adding two vectors too large for the caches, dispatch the time of a node that does nothing much.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.runtimes import Runtime, get_runtime
from bench.timing import warm_up
from bench.work import FUSED, Work
from deploy_prune.files import scratch_directory

if TYPE_CHECKING:
    import numpy as np

SIDE = 1024  # of the matrices: 2 GFLOP, 12 MB
LENGTH = 1 << 26  # of the vectors: 256 MiB each, beyond any last-level cache but the largest
CHAIN = 200  # tiny nodes, of which a call's fixed cost is a small part
CALLS = 7
BINDS = 0.4  # of the measured time that a ceiling must explain to be called the bound
UNALIGNED = 0.25  # of the flops


@dataclass(frozen=True)
class Ceilings:
    """`flops` and `bytes` per second, `dispatch` seconds per node, as `runtime` reached them on `device`."""

    runtime: str
    device: str
    threads: int | None
    flops: float
    bytes: float
    dispatch: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def shares(self, work: Work, seconds: float) -> dict[str, float]:
        """Of the measured time, how much computing, moving bytes and starting nodes would take at their ceilings."""
        return {
            "compute": work.flops / self.flops / seconds,
            "memory": work.bytes / self.bytes / seconds,
            "launch": work.nodes * self.dispatch / seconds,
        }


def measure_ceilings(
    runtime: str | Runtime = "ort-cpu",
    *,
    threads: int | None = None,
    side: int | None = None,
    length: int | None = None,
) -> Ceilings:
    """Time three graphs of one operator each; takes seconds. Raises UnavailableError for an absent runtime, and for one
    that runs checkpoints instead of ONNX files."""
    import numpy as np

    runtime = get_runtime(runtime) if isinstance(runtime, str) else runtime
    side, length = side or SIDE, length or LENGTH
    generator = np.random.default_rng(0)
    square = generator.standard_normal((side, side)).astype(np.float32)
    vector = generator.standard_normal(length).astype(np.float32)
    few = np.ones(8, np.float32)
    facts: dict[str, Any] = {}

    def seconds(name: str, op: str, value: np.ndarray, times: int = 1) -> float:
        with scratch_directory() as directory:
            file = _chain(directory / f"{name}.onnx", op, value.shape, times)
            session = runtime.load(file, threads=threads)
            bound = session.bind({"x": value, "z": value})
            facts.update(session.describe())
            warm_up(bound)
            taken = []
            for _ in range(CALLS):
                began = time.perf_counter()
                bound()
                taken.append(time.perf_counter() - began)
        return min(taken) if times == 1 else statistics.median(taken)

    product = seconds("product", "MatMul", square)
    stream = seconds("stream", "Add", vector)
    dispatch = seconds("dispatch", "Mul", few, CHAIN) / CHAIN
    return Ceilings(
        str(facts["runtime"]), str(facts["device"]), threads, 2 * side**3 / product, 12 * length / stream, dispatch
    )


def reasons(own: Work, dense: Work, own_s: float, ceilings: Ceilings, vanished: int = 0) -> list[str]:
    """Why a model is not faster than the dense one, the weightiest first; empty when nothing here explains it.

    `own_s` are its measured seconds; `vanished` sublayers explain as many fused nodes less.
    """
    found: list[tuple[float, str]] = []
    shares = ceilings.shares(own, own_s)
    if shares["launch"] >= BINDS:
        found.append(
            (shares["launch"], f"launch-bound: starting {own.nodes} nodes takes {shares['launch']:.0%} of the time")
        )
    if shares["memory"] >= BINDS and shares["memory"] > shares["compute"]:
        gib = own.bytes / 2**30
        found.append(
            (shares["memory"], f"memory-bound: {gib:.2f} GiB are read and written, {shares['memory']:.0%} of the time")
        )
    if own.unaligned >= UNALIGNED and own.unaligned > dense.unaligned:
        found.append(
            (own.unaligned, f"unaligned widths in {own.unaligned:.0%} of the operations; export with --align 8")
        )
    lost = _lost(own.operators, dense.operators, vanished)
    if lost:
        found.append((1.0, f"lost fusion: {', '.join(lost)}"))
    saved = 1 - own.flops / max(1, dense.flops)
    if saved < 0.05:
        found.append((0.01, f"hardly less work: {saved:.0%} fewer operations than the dense model"))
    return [text for _, text in sorted(found, reverse=True)]


def _lost(own: Mapping[str, int], dense: Mapping[str, int], vanished: int) -> list[str]:
    """Fused operators of the dense graph that are missing here although the graph has not fewer nodes for it."""
    more = sum(own.values()) > sum(dense.values())
    return [
        f"{op} {dense[op]} to {own.get(op, 0)}"
        for op in sorted(FUSED & dense.keys())
        if dense[op] - own.get(op, 0) > vanished and more
    ]


def _chain(file: Path, op: str, shape: tuple[int, ...], times: int) -> Path:
    """x op z op z ...: `times` nodes on tensors of one shape, none of which an optimiser can fold."""
    import onnx
    from onnx import TensorProto, helper

    names = ["x", *(f"h{i}" for i in range(1, times)), "y"]
    nodes = [helper.make_node(op, [names[i], "z"], [names[i + 1]]) for i in range(times)]
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))  # noqa: E731
    graph = helper.make_graph(nodes, "ceiling", [value("x"), value("z")], [value("y")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(file))
    return file
