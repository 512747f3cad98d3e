"""A member's graph: valid ONNX, standard operators, the stated interface, no data from outside the bundle. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from converters.precision.formats import WEIGHT_ONLY
from converters.variants import CONTRIB, DOMAINS
from deploy_prune.release.manifest import DecoderEntry, Manifest, Member, TensorEntry, check_relative

if TYPE_CHECKING:
    import onnx

Graph = Member | DecoderEntry  # each names one ONNX file
_ONNX_TYPES = {1: "float32", 7: "int64", 10: "float16", 16: "bfloat16"}


def graph_problems(
    bundle: Path,
    manifest: Manifest,
    member: Graph,
    inputs: Sequence[TensorEntry],
    outputs: Sequence[TensorEntry],
    precision: str,
) -> Iterator[str]:
    """What of a member's ONNX file, in a precision, is not as it must be. A file with data from elsewhere is not opened
    further."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    file = manifest.files[member.file]
    external = manifest.files[member.external].bytes if member.external else 0
    if (file.sha256, file.bytes + external) != (member.sha256, member.bytes):
        yield f"{member.file} is not the file that was measured (sha256 or bytes)"
    path = bundle / member.file
    try:
        graph = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        yield f"{member.file} is not an ONNX file ({error})"
        return
    outside = list(_external_problems(graph, manifest, member))
    yield from outside
    if outside:
        return
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        yield f"{member.file} is not valid ONNX: {str(error).strip()[:300]}"
    yield from _interface_problems(graph, member, inputs, outputs, precision)


def _external_problems(model: onnx.ModelProto, manifest: Manifest, member: Graph) -> Iterator[str]:
    """External data must be the one file the manifest names, beside the graph."""
    folder = Path(member.file).parent
    locations = set()
    for tensor in _tensors(model):
        locations |= {entry.value for entry in tensor.external_data if entry.key == "location"}
        if tensor.data_location == tensor.EXTERNAL and not any(e.key == "location" for e in tensor.external_data):
            yield f"{member.file} has external data without a place"
    for location in sorted(locations):
        try:
            name = check_relative((folder / check_relative(location)).as_posix())
        except ValueError as error:
            yield f"{member.file} reads external data: {error}"
            continue
        if name != member.external or name not in manifest.files:
            yield f"{member.file} reads external data from {location}, which the manifest does not name"


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor of a model: of its graph and the graphs inside it, of its functions and training graphs."""
    for graph in (model.graph, *(g for t in model.training_info for g in (t.initialization, t.algorithm))):
        yield from _of_graph(graph)
    for function in model.functions:
        yield from _of_nodes(function.node)


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)
            for sparse in (
                *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []),
                *attribute.sparse_tensors,
            ):
                yield from (sparse.values, sparse.indices)
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _of_graph(inner)


def _interface_problems(
    graph: onnx.ModelProto,
    member: Graph,
    inputs: Sequence[TensorEntry],
    outputs: Sequence[TensorEntry],
    precision: str,
) -> Iterator[str]:
    for entry, values in ((inputs, graph.graph.input), (outputs, graph.graph.output)):
        want = [(t.name, t.dtype, t.shape) for t in entry]
        got = [
            (
                v.name,
                _ONNX_TYPES.get(v.type.tensor_type.elem_type, "other"),
                [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
            )
            for v in values
        ]
        if want != got:
            yield f"{member.file} has {got}, the manifest says {want}"
    allowed = {*DOMAINS[member.variant], "ai.onnx", *([CONTRIB] if precision in WEIGHT_ONLY else [])}
    if foreign := sorted({node.domain for node in graph.graph.node} - allowed):
        yield f"{member.file} uses operators of {', '.join(foreign)}, which variant {member.variant} may not"
    if [o.version for o in graph.opset_import if o.domain in ("", "ai.onnx")] != [member.opset]:
        yield f"{member.file} is not of opset {member.opset}"
