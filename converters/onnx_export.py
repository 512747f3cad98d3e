"""torch -> ONNX: one file in fp32, dynamic sizes, in one of several forms, the same bytes for the same model."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.graph import Initializers, account, foreign_nodes, name_dimensions, simplify
from converters.tracing import trace
from converters.variants import VARIANTS
from deploy_prune.errors import UnsupportedModelError, UsageError
from deploy_prune.files import atomic_file, atomic_siblings, sha256_file

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from converters.variants import Variant
    from deploy_prune.signature import Signature

# A protobuf holds 2 GiB; above this the weights lie beside the graph, in FILE.data.
EXTERNAL_ABOVE = 1_900_000_000
# Two unlike sizes, neither 0 nor 1: the tracer takes those for constants and equal ones for the same dimension.
EXAMPLE_SIZES = {"batch": 2, "sequence": 11}


@dataclass(frozen=True)
class ExportReport:
    """What was written. `bytes` counts the file and, for large models, its `external` data file.

    `initializers` sorts every stored tensor: for a model whose parameters are all read,
    sum(initializers.weights.values()) == 4 × parameters, exactly.
    """

    file: str
    sha256: str
    bytes: int
    external: str | None
    opset: int
    variant: str
    nodes: int
    inputs: list[dict[str, Any]]
    output: dict[str, Any]
    initializers: Initializers
    seconds: float

    @property
    def weight_bytes(self) -> int:
        return sum(self.initializers.weights.values())

    @property
    def initializer_bytes(self) -> int:
        return self.initializers.bytes

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def export_onnx(
    model: nn.Module,
    file: Path | str,
    signature: Signature,
    *,
    opset: int = 18,
    variant: Variant = "plain",
    example_sizes: Mapping[str, int] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ExportReport:
    """Write `signature.call` of `model` as an ONNX file, atomically; the model is left as it was.

    `variant` is the form of the graph (converters/variants.py): `plain` as traced, every weight under its own name;
    `standard` and `ort` made to run fast, `ort` with ONNX Runtime's own operators. Both want opset 20, which has Gelu.
    `metadata` becomes the file's metadata properties. Raises UsageError for weights that are not float32 and
    UnsupportedModelError when the model cannot be traced, a dimension freezes, or `variant` may not use a node.
    """
    import onnx
    import onnx_ir as ir

    start = time.perf_counter()
    if variant not in VARIANTS:
        raise UsageError(f"no variant {variant!r}", expected=", ".join(VARIANTS))
    if opset < 18:
        raise UsageError("opset too old", expected="18 or newer", got=str(opset))
    _check_float32(model)
    exported = trace(model, signature, {**EXAMPLE_SIZES, **(example_sizes or {})}, opset)
    parameters = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    buffers = {name: b.numel() * b.element_size() for name, b in model.named_buffers()}
    simplify(exported, set(parameters), variant)
    initializers = account(exported, parameters, buffers)
    path = Path(file)
    large = initializers.bytes > EXTERNAL_ABOVE
    with _files(path, large) as (target, data):
        if data is not None:
            ir.external_data.unload_from_model(exported, target.parent, data.name, size_threshold_bytes=1024)
        proto = ir.to_proto(exported)
        name_dimensions(proto, signature)
        if foreign := foreign_nodes(proto, variant):
            raise UnsupportedModelError(
                f"the graph needs operators that variant {variant} may not use",
                problems=foreign,
                remedy="A plain runtime could not load it; replace these in the model.",
            )
        _sign(proto, metadata or {})
        serialized = proto.SerializeToString(deterministic=True)
        target.write_bytes(serialized)
        onnx.checker.check_model(str(target) if large else serialized, full_check=True)
        size = len(serialized) + (data.stat().st_size if data is not None else 0)
    described = signature.describe()
    return ExportReport(
        file=path.name,
        sha256=sha256_file(path) if large else hashlib.sha256(serialized).hexdigest(),
        bytes=size,
        external=_data_name(path) if large else None,
        opset=exported.opset_imports[""],
        variant=variant,
        nodes=len(proto.graph.node),
        inputs=described["inputs"],
        output=described["output"],
        initializers=initializers,
        seconds=time.perf_counter() - start,
    )


def _check_float32(model: nn.Module) -> None:
    import torch

    wrong = [f"{name}: {p.dtype}" for name, p in model.named_parameters() if p.dtype != torch.float32]
    if wrong:
        raise UsageError(
            "export takes float32 weights", problems=wrong[:20], remedy="Load the model with dtype=torch.float32."
        )


def _sign(proto: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    from deploy_prune.version import __version__

    proto.producer_name, proto.producer_version = "deploy-prune", __version__
    for key in sorted(metadata):
        proto.metadata_props.add(key=key, value=metadata[key])


def _data_name(path: Path) -> str:
    return path.name + ".data"


@contextlib.contextmanager
def _files(path: Path, large: bool) -> Iterator[tuple[Path, Path | None]]:
    """Yield where to write the graph and, for `large` models, its data; both appear under their names only when whole.

    The graph names its data file, so the two are written in a temporary directory under their final names, and a
    graph never lacks its data.
    """
    if not large:
        with atomic_file(path) as temporary:
            yield temporary, None
        return
    with atomic_siblings(path) as temporary:
        yield temporary, temporary.with_name(_data_name(path))
