"""What a conversion is given: an fp32 file, nodes of it to keep, options that exist, calibration data that it takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import ArtifactError, UnsupportedModelError, UsageError, did_you_mean

if TYPE_CHECKING:
    import onnx

_NARROW = {10: "fp16", 16: "bf16"}  # TensorProto.FLOAT16, BFLOAT16


def check_option(name: str, value: str, known: Sequence[str]) -> None:
    """Raises UsageError for a value that is not `known`."""
    if value not in known:
        raise UsageError(f"no {name} {value!r}", remedy=did_you_mean(str(value), known))


def matching(patterns: Sequence[str], names: Collection[str]) -> set[str]:
    """The names of nodes that any pattern matches.

    Raises UsageError for patterns that match none.
    """
    found = {pattern: matched(pattern, names) for pattern in patterns}
    if unknown := [repr(pattern) for pattern, those in found.items() if not those]:
        raise UsageError(
            f"no node is called {', '.join(unknown)}",
            where="nodes to keep in fp32",
            remedy="`*` stands for any text; the names are those of the fp32 file.",
        )
    return set().union(*found.values())


def matched(pattern: str, names: Collection[str]) -> set[str]:
    """The names that one pattern matches; a name with brackets, which are a set in patterns, is itself first."""
    return {pattern} if pattern in names else {name for name in names if fnmatchcase(name, pattern)}


def node_names(path: Path) -> list[str]:
    """Names of the nodes of an ONNX file."""
    return [node.name for node in _read(path).graph.node]


def fp32_graph(path: Path) -> onnx.ModelProto:
    """The graph of an fp32 file that holds its weights.

    Raises ArtifactError for no ONNX file, UsageError for one in another precision, UnsupportedModelError for weights
    beside the file.
    """
    model = _read(path)
    if found := _noted(model) or _stored_in(model):
        raise UsageError(
            "only fp32 files are converted",
            where=str(path),
            got=found,
            remedy="Give the fp32 file that this one was made from.",
        )
    if any(i.data_location == i.EXTERNAL for i in model.graph.initializer):
        raise UnsupportedModelError(
            "a model with external data cannot be converted",
            where=str(path),
            expected="a file below 2 GB that holds its weights",
            remedy="Cut a smaller member, or convert with the runtime's own tools.",
        )
    return model


def precision_of(path: Path) -> str:
    """The precision that a file says it was converted to, or a half precision that it stores weights in, else fp32.

    Raises ArtifactError for no ONNX file.
    """
    model = _read(path)
    return _noted(model) or _stored_in(model) or "fp32"


def _stored_in(model: onnx.ModelProto) -> str | None:
    """The half precision of a stored value, whoever made the file."""
    return next((_NARROW[i.data_type] for i in model.graph.initializer if i.data_type in _NARROW), None)


def check_batches(
    model: onnx.ModelProto, batches: Sequence[Any], mask: str | None, caches: Collection[str] = ()
) -> None:
    """Raises UsageError for batches that are not the graph's inputs, of which only `caches` may be empty, or a `mask`
    that is none of them."""
    import numpy as np
    from onnx import helper

    stored = {i.name for i in model.graph.initializer}
    wanted = {v.name: v.type.tensor_type for v in model.graph.input if v.name not in stored}
    if mask is not None and mask not in wanted:
        raise UsageError(f"no input is called {mask!r}", where="mask", remedy=did_you_mean(mask, tuple(wanted)))
    if not batches:
        raise UsageError("no calibration data", remedy="Give at least one batch of inputs.")
    for number, batch in enumerate(batches):
        where = f"calibration batch {number}"
        names = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        if names != sorted(wanted):
            raise UsageError(
                "not the inputs of the graph", where=where, expected=f"a mapping of {sorted(wanted)}", got=str(names)
            )
        for name, kind in wanted.items():
            dtype, value = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)), batch[name]
            sizes = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
            shape = f"{dtype} array of shape ({', '.join('any' if s is None else str(s) for s in sizes)})"
            if not isinstance(value, np.ndarray):
                raise UsageError(f"{name} is no numpy array", where=where, expected=shape, got=type(value).__name__)
            fits = len(sizes) == value.ndim and all(s in (None, n) for s, n in zip(sizes, value.shape, strict=True))
            if value.dtype != dtype or not fits or not (value.size or name in caches):
                got = f"{value.dtype} array of shape {value.shape}"
                raise UsageError(f"{name} is not as the graph wants it", where=where, expected=shape, got=got)
            if value.dtype.kind == "f" and np.isnan(value).any():
                raise UsageError(f"{name} holds NaN", where=where, remedy="Calibrate on inputs that are numbers.")


def _read(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise ArtifactError("not an ONNX file", where=str(path), got=str(error)[:200]) from error


def _noted(model: onnx.ModelProto) -> str | None:
    return next((p.value for p in model.metadata_props if p.key == "deploy_prune.precision"), None)
