"""The audit of a graph: what ONNX Runtime makes of it, layer by layer, against what the dense model's graph became.

The session's optimised graph is written out and read. A node belongs to the prunable layer whose weights were read last
before it, in execution order. Nothing is run and no torch is imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.passes.stored import parts_of
from converters.precision.int8 import QUANTIZED, TRANSPOSED
from deploy_prune.errors import ArtifactError
from deploy_prune.files import existing, scratch_directory

if TYPE_CHECKING:
    import onnx

    from deploy_prune.units import Site

ATTENTION = ("Attention", "MultiHeadAttention", "GroupQueryAttention")
# What one node may do that would otherwise be many; any of a kind is as good as another.
FUSIONS = {"attention": ATTENTION, "activation": ("Gelu", "BiasGelu", "FastGelu", "QuickGelu")}
MOVES = ("Transpose", "Cast", "ReorderInput", "ReorderOutput", "Expand", "Slice", "Split", "Concat")
OUTSIDE = "(outside)"
# Kernels of a linear layer whose weights have 8 or 4 bits.
INTEGER = ("MatMulNBits", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger")


@dataclass(frozen=True)
class LayerAudit:
    """One layer: its optimised nodes by operator, and the head count its fused attention states (None without one).

    `LayerAudit("blocks.3.attn", {"Attention": 1, "Gemm": 1}, heads=2)`.
    """

    layer: str
    ops: dict[str, int]
    heads: int | None = None


@dataclass(frozen=True)
class GraphAudit:
    """What a file became. `moves` counts the nodes that only move data; `weight_bytes` is what the file stores of
    parameters."""

    runtime: str
    nodes: int
    moves: int
    weight_bytes: int
    layers: tuple[LayerAudit, ...]

    @staticmethod
    def of(data: Mapping[str, Any]) -> GraphAudit:
        """From the plain data of `judge_graph`."""
        layers = tuple(LayerAudit(**layer) for layer in data["layers"])
        return GraphAudit(data["runtime"], data["nodes"], data["moves"], data["weight_bytes"], layers)

    def layer(self, name: str) -> LayerAudit | None:
        return next((layer for layer in self.layers if layer.layer == name), None)


def layers_of(sites: Iterable[Site]) -> dict[str, str]:
    """Module -> layer, for every module that a prunable layer cuts."""
    return {module: site.name for site in sites for module, _ in site.axes()}


def read_graph(file: Path | str, modules: Mapping[str, str]) -> GraphAudit:
    """The audit of an ONNX file. Raises UnavailableError for no file, ArtifactError when ONNX Runtime refuses it."""
    import onnx
    import onnxruntime

    file = existing(file, "ONNX file")
    with scratch_directory(needs=file.stat().st_size) as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # that the optimised graph is for this machine is what is wanted
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        try:
            onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            raise ArtifactError("onnxruntime cannot load the model", where=str(file), got=str(error)[:400]) from error
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    stored = onnx.load(str(file), load_external_data=False).graph.initializer
    held = sum(_bytes(tensor) for tensor in stored if _is_weight(tensor.name, modules))
    counts: dict[str, Counter[str]] = {}
    heads: dict[str, int] = {}
    current = OUTSIDE
    for node in graph.node:
        current = _layer_read(node, modules) or current
        counts.setdefault(current, Counter())[node.op_type] += 1
        if node.op_type in ATTENTION:
            heads[current] = next((a.i for a in node.attribute if a.name.endswith("num_heads")), 0)
    return GraphAudit(
        f"onnxruntime {onnxruntime.__version__}, CPU",
        len(graph.node),
        sum(counts[layer][op] for layer in counts for op in MOVES),
        held,
        tuple(LayerAudit(name, dict(sorted(found.items())), heads.get(name)) for name, found in counts.items()),
    )


def judge_graph(
    found: GraphAudit, dense: GraphAudit, heads: Mapping[str, int], vanished: Sequence[str]
) -> dict[str, Any]:
    """The audit as plain data with its verdict: `{"passed": False, "problems": ["blocks.3.attn: ..."], "layers": ...}`.

    `heads` are the query heads the plan leaves each attention, `vanished` the layers that are gone. A fusion the dense
    model's layer has and this one lacks is lost; a fused attention must state the plan's heads.
    """
    problems = []
    for was in dense.layers:
        if was.layer == OUTSIDE or was.layer in vanished:
            continue
        now = found.layer(was.layer)
        ops = now.ops if now is not None else {}
        lost = [kind for kind, names in FUSIONS.items() if _any(was.ops, names) and not _any(ops, names)]
        if lost:
            problems.append(f"{was.layer}: {', '.join(lost)} fused in the dense model, not here ({_written(ops)})")
        elif now is not None and now.heads is not None and now.heads != heads.get(was.layer, now.heads):
            problems.append(f"{was.layer}: attention of {now.heads} heads, the plan keeps {heads[was.layer]}")
    layers = [asdict(layer) for layer in found.layers]
    return {**asdict(found), "layers": layers, "passed": not problems, "problems": problems}


def _layer_read(node: onnx.NodeProto, modules: Mapping[str, str]) -> str | None:
    """The layer one of whose weights the node reads."""
    for name in node.input:
        for part in parts_of(name.removesuffix(QUANTIZED).removesuffix(TRANSPOSED)):
            module = part.parameter.rpartition(".")[0]
            layer = modules.get(module) or modules.get(part.parameter)
            if layer is not None:
                return layer
    return None


def _is_weight(name: str, modules: Mapping[str, str]) -> bool:
    return any(
        (p.parameter.rpartition(".")[0] in modules or p.parameter in modules)
        for p in parts_of(name.removesuffix(QUANTIZED).removesuffix(TRANSPOSED))
    )


def _bytes(tensor: onnx.TensorProto) -> int:
    import math

    from onnx import helper

    return math.prod(tensor.dims) * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _any(ops: Mapping[str, int], names: Sequence[str]) -> bool:
    return any(name in ops for name in names)


def _written(ops: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {op}" for op, count in ops.items()) or "nothing"
