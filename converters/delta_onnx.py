"""One base ONNX file serves many tasks: a delta's tensors replace initializers, while a session is made or in a file.

In the first case the base's file lies on disk once, and of a task there is only its delta.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from converters.onnx_session import OnnxSession
from converters.passes.stored import TRANSPOSED
from deploy_prune.errors import ArtifactError
from deploy_prune.files import atomic_file, existing

if TYPE_CHECKING:
    from deploy_prune.delta import TaskDelta


def task_session(base: Path | str, delta: TaskDelta, *, threads: int | None = None) -> OnnxSession:
    """A session of the base's ONNX file with the delta's task in it.

    The initializers are replaced in memory before onnxruntime sees the graph. Its own `add_initializer` would not do:
    constants that it folds while loading would still be made of the file's values. Raises ArtifactError when a changed
    tensor is not in the file, is another one, the head has another shape, or the file's weights lie beside it.
    """
    return OnnxSession(base, threads=threads, content=_task_graph(base, delta).SerializeToString())


def write_task(base: Path | str, delta: TaskDelta, output: Path | str) -> None:
    """The task's own ONNX file, made from the base's without tracing anything, atomically. Raises as `task_session`."""
    with atomic_file(output) as temporary:
        temporary.write_bytes(_task_graph(base, delta).SerializeToString(deterministic=True))


def _task_graph(base: Path | str, delta: TaskDelta) -> Any:
    from onnx import numpy_helper

    path = existing(base, "ONNX file")
    model = _loaded(path)
    values = task_initializers({i.name: numpy_helper.to_array(i) for i in model.graph.initializer}, delta, str(path))
    for stored in model.graph.initializer:
        if stored.name in values:
            stored.CopyFrom(numpy_helper.from_array(values[stored.name], stored.name))
    return model


def task_initializers(stored: Mapping[str, NDArray[Any]], delta: TaskDelta, where: str) -> dict[str, NDArray[Any]]:
    """Of the base's `stored` initializers, those that the delta changes, with their new values.

    Raises ArtifactError naming `where` when a changed tensor is not there, is another one, or the head has another
    shape.
    """
    made: dict[str, NDArray[Any]] = {}
    problems = []

    def find(name: str) -> tuple[str, NDArray[Any]] | None:
        for key in (name, name + TRANSPOSED):
            if key in stored:
                return key, (stored[key].T if key.endswith(TRANSPOSED) else stored[key])
        problems.append(f"{name}: the file has no such initializer")
        return None

    def put(key: str, values: NDArray[Any]) -> None:
        made[key] = np.ascontiguousarray(values.T if key.endswith(TRANSPOSED) else values)

    for name, change in delta.changes.items():
        if (found := find(name)) is None:
            continue
        key, old = found
        words = np.ascontiguousarray(old).reshape(-1).view(change.bits.dtype).copy()
        if tuple(old.shape) != change.shape or hashlib.sha256(words.tobytes()).hexdigest() != change.base_sha256:
            problems.append(f"{name}: other values than the base's")
            continue
        words[change.positions] ^= change.bits
        put(key, words.view(old.dtype).reshape(old.shape))
    for name, tensor in delta.head.items():
        if (found := find(name)) is None:
            continue
        key, old = found
        if tuple(old.shape) != tuple(tensor.shape):
            problems.append(f"{name}: the file has shape {tuple(old.shape)}, the task's head {tuple(tensor.shape)}")
            continue
        put(key, tensor.numpy())
    if problems:
        raise ArtifactError(
            "the delta does not fit this ONNX file",
            where=where,
            problems=problems[:8],
            remedy="Export the base model that the delta names, with a head of the task's size, or a file of the "
            "task's own: deploy-prune delta export.",
        )
    return made


def _loaded(path: Path) -> Any:
    """The file's graph with its weights. Raises ArtifactError for no ONNX file, or one whose weights lie beside it."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ArtifactError(
            "not an ONNX file", where=str(path), got=str(error)[:200], remedy="Export the base again."
        ) from error
    if any(i.data_location == onnx.TensorProto.EXTERNAL for i in model.graph.initializer):
        raise ArtifactError(
            "the base's weights lie beside its file",
            where=str(path),
            remedy="Export the task's model from torch: deploy-prune delta export DELTA -o TASK.onnx.",
        )
    return model
