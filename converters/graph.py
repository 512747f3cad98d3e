"""From a raw exported graph to a published one: simplified, weights counted, named and stored once, nothing private."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converters.passes.stored import holds, parts_of
from converters.passes.strip import StripMetadata
from converters.passes.weights import MergeConstants, TransposeWeights
from converters.variants import DOMAINS, Variant, apply
from deploy_prune.errors import UnsupportedModelError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from deploy_prune.signature import Signature


@dataclass(frozen=True)
class Initializers:
    """What the initialisers of a graph are: bytes by name, `{"blocks.0.mlp.fc1.weight.T": 147456}`.

    `weights` are parameters of the model, each stored once; `buffers` its buffers; `constants` everything else.
    `unused` holds the bytes of parameters the exported function never reads, by torch name.
    """

    weights: dict[str, int]
    buffers: dict[str, int]
    constants: dict[str, int]
    unused: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(sum(group.values()) for group in (self.weights, self.buffers, self.constants))


def simplify(model: ir.Model, weights: set[str], variant: Variant = "plain") -> None:
    """Fold constants, drop no-ops and duplicates, store weights as they are read, in the form of `variant`. In place.

    The rules look at shapes and constants, never at the values of `weights`: models that differ in weights alone
    get the same graph. (The exporter's own optimiser drops zero biases and merges equal weights.)
    """
    import onnx_ir.passes.common as common
    from onnxscript import optimizer, rewriter

    common.InlinePass()(model)
    TransposeWeights(weights)(model)

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(v is not None and holds(v.name, weights) for v in node.inputs) else None

    for _ in range(2):  # a rule may free a constant, and a constant enable a rule
        optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
        rewriter.rewrite(model, _rules())
    common.RemoveUnusedNodesPass()(model)
    apply(model, variant, weights)
    common.RemoveUnusedOpsetsPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    MergeConstants(weights)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.NameFixPass()(model)
    StripMetadata()(model)


def _rules() -> list[Any]:
    """The rewrite rules that pay on transformers, each in time linear in the graph (`slice_split_rule` is not)."""
    from onnxscript.rewriter.rules import common

    return [
        common.materialize_reshape_shape_rule,
        common.reshape_reshape_rule,
        common.squeeze_reshape_1d_rule,
        common.collapse_slice_rule,
        common.collapse_slice2_rule,
        common.no_op_cast_rule,
        common.cast_cast_rule,
        common.no_op_expand_rule,
        common.no_op_transpose_rule,
        common.transpose_transpose_rule,
        common.unsqueeze_unsqueeze_rule,
    ]


def account(model: ir.Model, parameters: Mapping[str, int], buffers: Mapping[str, int]) -> Initializers:
    """Sort the initialisers into weights, buffers and constants; `parameters` and `buffers` give bytes by torch name.

    Raises UnsupportedModelError when a weight is stored twice or in another size.
    """
    found: dict[str, dict[str, int]] = {"weights": {}, "buffers": {}, "constants": {}}
    seen: dict[str, list[tuple[int, int | None, str]]] = {}
    problems = []
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        parts = parts_of(name)
        if any(part.parameter in parameters for part in parts):
            found["weights"][name] = value.const_value.nbytes
            for part in parts:
                seen.setdefault(part.parameter, []).append((part.start or 0, part.stop, name))
        else:
            found["buffers" if parts[0].parameter in buffers else "constants"][name] = value.const_value.nbytes
    for parameter, stored in seen.items():
        stored.sort(key=lambda each: each[0])
        for (_, stop, first), (start, _, second) in itertools.pairwise(stored):
            if stop is None or start < stop:
                problems.append(f"{parameter}: stored as {first} and as {second}")
    total, expected = sum(found["weights"].values()), sum(parameters.get(name, 0) for name in seen)
    if total != expected:
        problems.append(f"{total} bytes of weights, the parameters have {expected}")
    if problems:
        raise UnsupportedModelError(
            "the exported graph does not hold the weights as they are",
            problems=problems,
            remedy="Report this with the versions of torch and onnxscript.",
        )
    unused = {name: size for name, size in parameters.items() if name not in seen}
    return Initializers(**found, unused=unused)


def name_dimensions(proto: onnx.ModelProto, signature: Signature) -> None:
    """Give the dynamic dimensions the signature's names, everywhere, and check the interface against it. In place.

    Raises UnsupportedModelError when tracing froze a dimension that must stay dynamic, or made another interface.
    """
    names: dict[str, str] = {}
    problems = []
    for specs, values in ((signature.inputs, proto.graph.input), (signature.outputs, proto.graph.output)):
        if [s.name for s in specs] != [v.name for v in values]:
            problems.append(f"the graph has {[v.name for v in values]}, the signature {[s.name for s in specs]}")
            continue
        for spec, value in zip(specs, values, strict=True):
            dims = value.type.tensor_type.shape.dim
            got = [d.dim_param or "?" if d.WhichOneof("value") != "dim_value" else d.dim_value for d in dims]
            if len(dims) != len(spec.shape) or any(
                isinstance(want, str) != isinstance(have, str) or (isinstance(want, int) and want != have)
                for want, have in zip(spec.shape, got, strict=False)
            ):
                problems.append(f"{spec.name}: the graph has shape {got}, the signature {list(spec.shape)}")
                continue
            for dim, want in zip(dims, spec.shape, strict=True):
                if isinstance(want, str):
                    if dim.dim_param.isidentifier():
                        names[dim.dim_param] = want
                    dim.dim_param = want
    if problems:
        raise UnsupportedModelError(
            "the exported graph is not the function of the signature",
            problems=problems,
            remedy="The model computes with a fixed size where the signature says dynamic; "
            "make its forward depend on the input's shape.",
        )
    symbol = re.compile(r"\b(" + "|".join(map(re.escape, sorted(names))) + r")\b") if names else None
    for value in proto.graph.value_info:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param and symbol:
                dim.dim_param = symbol.sub(lambda match: names[match.group()], dim.dim_param)


def foreign_nodes(proto: onnx.ModelProto, variant: Variant = "plain") -> list[str]:
    """Nodes outside the operator domains that `variant` may use, and functions, one line each."""
    allowed = {*DOMAINS[variant], "ai.onnx"}
    return [
        f"{node.name or node.op_type}: {node.domain}::{node.op_type}"
        for node in proto.graph.node
        if node.domain not in allowed
    ] + [f"function {f.domain}::{f.name}" for f in proto.functions]
