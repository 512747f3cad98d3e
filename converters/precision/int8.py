"""Linear layers in 8 bits by ONNX Runtime's quantiser, and tables of embeddings row by row.

A layer y = xW + b has its weights as int8 with a scale per output, q = round(W / s), |q| <= 127. Its inputs are uint8:
`int8-dynamic` takes their range anew for every call (DynamicQuantizeLinear, MatMulInteger), `int8-static` from
calibration data (QuantizeLinear, DequantizeLinear, which runtimes fuse into integer kernels). Scores of attention,
norms, activations, the convolution of patches and the outputs of all layers stay float32.
"""

from __future__ import annotations

import contextlib
import io
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from converters.precision.given import matching
from deploy_prune.errors import UnavailableError, UnsupportedModelError

if TYPE_CHECKING:
    import numpy as np
    import onnx

LINEAR = ("Gemm", "MatMul")
QUANTIZED, SCALE, ZERO_POINT = "_quantized", "_scale", "_zero_point"  # suffixes of the quantiser's names
TRANSPOSED = "_Transposed"  # before them: of a weight that is stored the other way round
Calibrate = Literal["minmax", "percentile", "entropy"]
# The oldest onnxruntime that was seen to quantise or run rightly; of the static ones 1.24 and 1.25 were not tried.
FROM = {
    "int8-dynamic": "1.32",
    "int8-static": "1.26",
    "int8-weight-only": "1.22",  # whose MatMulNBits first took 8 bits
    "int4-weight-only": "1.22",  # the head is in 8 bits
}
_PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")  # tells the quantiser that our graph is already simplified
_FLOAT = 1
_SMALL_TABLE = 65536  # bytes; a smaller table gains nothing


@dataclass(frozen=True)
class Quantized:
    """Which nodes of the fp32 graph now work on 8 bits, and which stay in fp32 as asked for."""

    nodes: tuple[str, ...]
    kept: tuple[str, ...]
    tables: tuple[str, ...]


def saturates() -> bool:
    """Whether this CPU is an x86 without VNNI, as Linux tells it, on which int8 kernels add up in 16 bits."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False  # not told


def quantize(
    source: Path,
    target: Path,
    *,
    batches: Sequence[Mapping[str, np.ndarray]] | None,
    calibrate: Calibrate = "minmax",
    percentile: float = 99.999,
    keep: Sequence[str] = (),
    reduce_range: bool = False,
) -> Quantized:
    """Write the 8-bit form of an fp32 file: static with calibration `batches`, dynamic without (None).

    Raises UnavailableError without onnxruntime, UnsupportedModelError when no layer can be quantised.
    """
    import onnx

    quantization = _quantizer()
    model = onnx.load(source)
    given = {value.name for value in model.graph.value_info}
    linear = [node.name for node in _linear(model)]
    kept = matching(keep, [node.name for node in model.graph.node])
    nodes = [name for name in linear if name not in kept]
    if not nodes:
        raise NoLayerError(source, len(linear))
    check_version("int8-dynamic" if batches is None else "int8-static")
    prepared = model.metadata_props.add(key=_PREPARED[0], value=_PREPARED[1])
    common: dict[str, Any] = {
        # the dynamic quantiser first turns every Gemm into MatMul and Add, and only then looks for the names
        "nodes_to_quantize": [*nodes, *(f"{name}_MatMul" for name in nodes)],
        "op_types_to_quantize": list(LINEAR),
        "per_channel": True,
        "reduce_range": reduce_range,
        "weight_type": quantization.QuantType.QInt8,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # the calibrators print what they do
        if batches is None:
            quantization.quantize_dynamic(model, target, extra_options={"MatMulConstBOnly": True}, **common)
        else:
            methods = quantization.CalibrationMethod
            method = {"minmax": methods.MinMax, "percentile": methods.Percentile, "entropy": methods.Entropy}
            quantization.quantize_static(
                model,
                target,
                _reader(batches),
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                calibrate_method=method[calibrate],
                extra_options={
                    "MatMulConstBOnly": True,
                    "OpTypesToExcludeOutputQuantization": list(LINEAR),
                    "CalibStridedMinMax": 1,  # ranges after every batch; otherwise all activations are held at once
                    "CalibPercentile": percentile,
                },
                **common,
            )
    made = onnx.load(target)
    if missed := [name for name in linear if name not in kept and name in _in_fp32(made)]:
        raise UnsupportedModelError(
            "the quantiser left linear layers in fp32 that were to be quantised",
            where=str(source),
            problems=missed[:20],
            remedy="Keep them in fp32 by name, if that is meant.",
        )
    tables = tuple(_tables(made, kept))
    inferred = [value for value in made.graph.value_info if value.name not in given]
    for value in inferred:
        made.graph.value_info.remove(value)
    del made.metadata_props[:]
    made.metadata_props.extend(p for p in model.metadata_props if p.key != prepared.key)
    made.producer_name, made.producer_version = model.producer_name, model.producer_version
    made.ir_version = max(made.ir_version, model.ir_version)
    target.write_bytes(made.SerializeToString(deterministic=True))
    return Quantized(tuple(nodes), tuple(sorted(kept)), tables)


class NoLayerError(UnsupportedModelError):
    """A file without a layer to quantise, of `known` that have stored weights."""

    def __init__(self, source: Path, known: int) -> None:
        got = f"{known} with stored weights, all of them kept" if known else "none with stored weights"
        super().__init__("no linear layer to quantise", where=str(source), got=got)


def _quantizer() -> Any:
    try:
        from onnxruntime import quantization
    except ImportError as error:
        raise UnavailableError(
            "onnxruntime is not installed", remedy="pip install 'deploy-prune[cpu]' (or [gpu])"
        ) from error
    return quantization


def check_version(kind: str) -> None:
    """Raises UnavailableError for an onnxruntime that is known to fail. Of the quantisers, below 1.32 the dynamic one
    turns the weight of a Gemm where it lies, though others read it and its shape is told; files of the static one of
    1.23 are wrong. Parity would refuse what they leave."""
    import onnxruntime
    from packaging import version

    if version.parse(onnxruntime.__version__) < version.parse(FROM[kind]):
        raise UnavailableError(
            f"this onnxruntime cannot make {kind} of what is exported here",
            expected=f"onnxruntime {FROM[kind]} or newer",
            got=onnxruntime.__version__,
            remedy="pip install -U onnxruntime",
        )


def _linear(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Linear layers: their weights are stored, not computed."""
    stored = {i.name for i in model.graph.initializer if len(i.dims) == 2 and i.data_type == _FLOAT}
    for node in model.graph.node:
        if node.op_type in LINEAR and not node.domain and len(node.input) > 1 and node.input[1] in stored:
            yield node


def _in_fp32(model: onnx.ModelProto) -> set[str]:
    """Names of the linear layers whose weights are stored in fp32, under the names they had before."""
    return {node.name.removesuffix("_MatMul") for node in _linear(model)}


def _reader(batches: Sequence[Mapping[str, np.ndarray]]) -> Any:
    """The batches as the quantiser's calibrators read them: a stretch at a time."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(batches)

        def __len__(self) -> int:
            return len(batches)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.rest = iter(batches[start_index:end_index])

        def get_next(self) -> Any:
            return next(self.rest, None)

    return Reader()


def _tables(model: onnx.ModelProto, kept: set[str]) -> Iterator[str]:
    """Store every table that only Gather reads as int8 with a scale per row, s_i = max|row i| / 127."""
    import numpy as np
    from onnx import helper, numpy_helper

    graph = model.graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for stored in list(graph.initializer):
        name, users = stored.name, readers.get(stored.name, [])
        if stored.data_type != _FLOAT or len(stored.dims) != 2 or 4 * stored.dims[0] * stored.dims[1] < _SMALL_TABLE:
            continue
        if not users or any(u.op_type != "Gather" or u.input[0] != name or _axis(u) or u.name in kept for u in users):
            continue
        table = numpy_helper.to_array(stored).astype(np.float32)
        scale = np.maximum(np.abs(table).max(1, keepdims=True) / 127, np.finfo(np.float32).tiny)
        graph.initializer.remove(stored)
        graph.initializer.append(numpy_helper.from_array(np.rint(table / scale).astype(np.int8), name + QUANTIZED))
        graph.initializer.append(numpy_helper.from_array(scale.astype(np.float32), name + SCALE))
        for user in users:
            out = user.output[0]
            rows, scales, wide = f"{out}.rows", f"{out}.scales", f"{out}.wide"
            nodes = [
                helper.make_node("Gather", [name + QUANTIZED, user.input[1]], [rows], f"{user.name}_rows"),
                helper.make_node("Gather", [name + SCALE, user.input[1]], [scales], f"{user.name}_scales"),
                helper.make_node("Cast", [rows], [wide], f"{user.name}_wide", to=_FLOAT),
                helper.make_node("Mul", [wide, scales], [out], f"{user.name}_values"),
            ]
            place = list(graph.node).index(user)
            graph.node.remove(user)
            for i, node in enumerate(nodes):
                graph.node.insert(place + i, node)
        yield name


def _axis(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 0)
