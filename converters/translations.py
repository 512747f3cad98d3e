"""Torch operators whose stock ONNX translation wastes work at run time, translated leaner, and common ones that have
none, for which the whole program would have to be decomposed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

# Added to masked scores. Finite, so that a row with nothing to attend to gives a mean, not NaN.
MASKED = -3.4028234663852886e38


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The `custom_translation_table` of `torch.onnx.export`."""
    import torch

    aten = torch.ops.aten
    return {
        aten.scaled_dot_product_attention.default: attention,
        aten.__and__.Tensor: both,
        aten.to.dtype: cast,
        aten.to.dtype_layout: cast,
        aten.to.device: cast_on,
    }


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(s·Q Kᵀ + M) V with Q (batch, heads, L, d), K and V (batch, kv_heads, S, d).

    The stock translation finds the shape of K at run time to transpose it (eight nodes) and scales both Q and K;
    here K is transposed by one node and Q alone is scaled. Under `enable_gqa` the queries of a group share K and V
    by broadcasting. `attn_mask` is boolean (True attends) or added to the scores.
    """
    import onnx_ir as ir
    from onnxscript import opset18 as op

    if dropout_p:
        raise ValueError("attention dropout is active; export the model in eval mode")
    if len(query.shape) != 4:
        raise ValueError(f"attention over {len(query.shape)} dimensions has no translation, expected 4")
    heads, kv_heads, width, value_width = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
    s = 1.0 / math.sqrt(width) if scale is None else scale
    grouped = enable_gqa and heads != kv_heads
    mask = _causal(query, key) if is_causal else attn_mask
    if attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
        mask = op.Where(attn_mask, op.Constant(value_float=0.0), op.Constant(value_float=MASKED))
    if grouped:
        if attn_mask is not None and len(attn_mask.shape) == 4:
            if attn_mask.shape[1] != 1:
                raise ValueError("grouped attention with a mask per head has no translation")
            mask = op.Unsqueeze(mask, op.Constant(value_ints=[2]))
        query = op.Reshape(query, op.Constant(value_ints=[0, kv_heads, heads // kv_heads, -1, width]))
        key, value = (op.Unsqueeze(x, op.Constant(value_ints=[2])) for x in (key, value))
    scores = op.MatMul(
        op.Mul(query, op.Constant(value_float=s)), op.Transpose(key, perm=[0, 1, 2, 4, 3] if grouped else [0, 1, 3, 2])
    )
    if mask is not None:
        scores = op.Add(scores, mask)
    out = op.MatMul(op.Softmax(scores, axis=-1), value)
    if grouped:
        out = op.Reshape(out, op.Constant(value_ints=[0, heads, -1, value_width]))
    return out


def both(self: Any, other: Any) -> Any:
    """a & b of booleans, as masks are joined, or of the bits of integers; of unlike types in the one torch gives."""
    import onnx_ir as ir
    import torch
    from onnxscript import opset18 as op

    examples = [torch.empty([1] * len(x.shape), dtype=getattr(torch, x.dtype.name.lower())) for x in (self, other)]
    to = ir.DataType[str(torch.result_type(*examples)).removeprefix("torch.").upper()]
    self, other = (x if x.dtype == to else op.Cast(x, to=to) for x in (self, other))
    return op.And(self, other) if to == ir.DataType.BOOL else op.BitwiseAnd(self, other)


def cast(self: Any, dtype: int | None = None, *args: Any, **options: Any) -> Any:
    """`self.to(dtype)`; how it lies in memory is nothing to a graph."""
    import onnx_ir as ir
    from onnxscript import opset18 as op

    if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        raise ValueError("ONNX casts no complex numbers")  # as parts of real ones, once decomposed
    return op.Identity(self) if dtype is None else op.Cast(self, to=dtype)


def cast_on(self: Any, device: Any, dtype: int | None = None, *args: Any, **options: Any) -> Any:
    """`self.to(device, dtype)`; a graph has no devices."""
    return cast(self, dtype)


def _causal(query: Any, key: Any) -> Any:
    """Additive (L, S) mask: 0 on and below the diagonal, MASKED above."""
    from onnxscript import opset18 as op

    length = op.Shape(query, start=2, end=3)
    source = op.Shape(key, start=2, end=3)
    blocked = op.Expand(op.Constant(value_float=MASKED), op.Concat(length, source, axis=0))
    return op.Trilu(blocked, op.Constant(value_int=1), upper=1)
