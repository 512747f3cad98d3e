"""One base ONNX file serves many tasks: a delta's tensors replace initializers, while a session is made or in a file.

In the first case the base's file lies on disk once, and of a task there is only its delta.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from converters.onnx_session import OnnxSession
from converters.passes.weights import TRANSPOSED
from deploy_prune.errors import ArtifactError, UsageError
from deploy_prune.files import atomic_file, existing

if TYPE_CHECKING:
    from deploy_prune.delta import TaskDelta


def task_session(base: Path | str, delta: TaskDelta, *, threads: int | None = None) -> OnnxSession:
    """A session of the base's ONNX file with the delta's task in it.

    Raises ArtifactError when a changed tensor is not in the file, is another one, or the head has another shape.
    """
    return OnnxSession(base, threads=threads, initializers=task_initializers(base, delta))


def write_task(base: Path | str, delta: TaskDelta, output: Path | str) -> None:
    """The task's own ONNX file, made from the base's without tracing anything, atomically.

    Raises UsageError for a base with weights in a file beside it, otherwise as `task_session`.
    """
    import onnx
    from onnx import numpy_helper

    values = task_initializers(base, delta)
    proto = onnx.load(existing(base, "ONNX file"), load_external_data=False)
    if any(i.data_location == onnx.TensorProto.EXTERNAL for i in proto.graph.initializer):
        raise UsageError(
            "the base's weights lie in a file beside it",
            where=str(base),
            remedy="Let a session take the delta at load time (task_session), or export the task's model from torch.",
        )
    for stored in proto.graph.initializer:
        if stored.name in values:
            stored.CopyFrom(numpy_helper.from_array(values[stored.name], stored.name))
    with atomic_file(output) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))


def task_initializers(base: Path | str, delta: TaskDelta) -> dict[str, NDArray[Any]]:
    """Every initializer of the base's file that the delta changes, with its new values."""
    import onnx
    from onnx import numpy_helper

    path = existing(base, "ONNX file")
    stored = {i.name: i for i in onnx.load(path).graph.initializer}
    made: dict[str, NDArray[Any]] = {}
    problems = []

    def find(name: str) -> tuple[str, NDArray[Any]] | None:
        for key in (name, name + TRANSPOSED):
            if key in stored:
                values = numpy_helper.to_array(stored[key], str(path.parent))
                return key, (values.T if key.endswith(TRANSPOSED) else values)
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
            where=str(path),
            problems=problems[:8],
            remedy="Export the base model that the delta names, with a head of the task's size, or a file of the "
            "task's own: deploy-prune delta export.",
        )
    return made
