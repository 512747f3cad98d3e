"""Where ONNX Runtime really put each node of a model, read from the profile of one run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.files import scratch_directory

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

SHAPE_ELEMENTS = 64  # no tensor has more dimensions than this; activations and token ids at any real size have more
_WHOLE = {"int64", "int32", "bool"}


@dataclass(frozen=True)
class Node:
    """One executed node: `Node("MatMul_3", "MatMul", "CPUExecutionProvider", shape_arithmetic=False)`.

    `shape_arithmetic`: each of its inputs and outputs is a scalar, or at most `SHAPE_ELEMENTS` whole numbers or
    booleans; or it is `Shape` itself, whatever it reads. ORT computes shapes on the host on purpose, because the
    host needs them to launch kernels.
    """

    name: str
    op: str
    provider: str
    shape_arithmetic: bool


@dataclass(frozen=True)
class Placement:
    nodes: tuple[Node, ...]

    def elsewhere(self, provider: str) -> tuple[Node, ...]:
        """Nodes that compute, rather than work out shapes, on another provider than `provider`."""
        return tuple(node for node in self.nodes if node.provider != provider and not node.shape_arithmetic)

    def to_json(self) -> dict[str, int]:
        """Counts: {"CUDAExecutionProvider": 212, "CPUExecutionProvider (shapes)": 9}."""

        def label(node: Node) -> str:
            host_shapes = node.shape_arithmetic and node.provider == "CPUExecutionProvider"
            return node.provider + (" (shapes)" if host_shapes else "")

        return dict(sorted(Counter(map(label, self.nodes)).items()))


def read_placement(
    profiled: Callable[[str], onnxruntime.InferenceSession], inputs: Mapping[str, np.ndarray]
) -> Placement:
    """Run once under ORT's profiler. `profiled(prefix)` makes a session that writes its profile under that prefix."""
    with scratch_directory() as directory:
        session = profiled(str(directory / "profile"))
        session.run(None, dict(inputs))
        return parse_profile(json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")))


def parse_profile(events: Iterable[Mapping[str, Any]]) -> Placement:
    """The placement in the events of an ORT profile; every node counts once however often it ran."""
    suffix = "_kernel_time"
    nodes: dict[tuple[str, str], Node] = {}
    for event in events:
        name, args = str(event.get("name", "")), event.get("args", {})
        if event.get("cat") != "Node" or not name.endswith(suffix) or "provider" not in args:
            continue
        name = name.removesuffix(suffix)
        outputs = args.get("output_type_shape", ())
        tensors = outputs if args["op_name"] == "Shape" else [*args.get("input_type_shape", ()), *outputs]
        node = Node(name, args["op_name"], args["provider"], bool(outputs) and all(map(_like_a_shape, tensors)))
        nodes[name, str(args.get("node_index"))] = node
    return Placement(tuple(nodes.values()))


def _like_a_shape(tensor: Mapping[str, list[int]]) -> bool:
    return all(math.prod(shape) <= (SHAPE_ELEMENTS if kind in _WHOLE else 1) for kind, shape in tensor.items())
