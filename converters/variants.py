"""The forms an exported graph may take: as traced, lean standard ONNX, or with ONNX Runtime's own operators."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import onnx_ir as ir

Variant = Literal["plain", "standard", "ort"]
CONTRIB = "com.microsoft"  # the domain of ONNX Runtime's own operators
VARIANTS: tuple[str, ...] = get_args(Variant)
# Operator domains each variant may use; a plain runtime knows the first alone.
DOMAINS: dict[str, tuple[str, ...]] = {"plain": ("",), "standard": ("",), "ort": ("", CONTRIB)}


def passes(variant: Variant, weights: Collection[str]) -> list[ir.passes.PassBase]:
    """The graph passes of a variant, in order. `weights` are the parameters' names."""
    from converters.passes.attention import FuseAttention
    from converters.passes.flat_tokens import FlatTokens
    from converters.passes.grouped_heads import StackGroups
    from converters.passes.no_op_reshape import NoOpReshape
    from converters.passes.rms_norm import DivideByRoot
    from converters.passes.rotary import FuseRotary
    from converters.passes.softmax_floor import FloorMaskedScores
    from converters.passes.split_linear import SplitLinear
    from converters.passes.vanished_zeros import VanishedZeros

    if variant == "plain":
        return []
    own = [FuseAttention(weights), FuseRotary(), FloorMaskedScores()] if variant == "ort" else []
    lean = [NoOpReshape(), VanishedZeros(), SplitLinear(weights), StackGroups()]
    return [*lean, *own, DivideByRoot(), FlatTokens(weights)]


def apply(model: ir.Model, variant: Variant, weights: Collection[str]) -> None:
    """Bring a simplified graph into the form of `variant`, in place."""
    from onnx_ir.passes import common

    for step in passes(variant, weights):
        step(model)
        common.RemoveUnusedNodesPass()(model)
