"""δ = z ⊙ w and E‖z‖₀ of very many gates, in pieces that stay in the processor's cache.

Step by step, autograd would write and read a dozen tensors as large as the model; here one is kept, the gates before
they are stretched. On a GPU the piece is the whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deploy_prune.hard_concrete import HardConcrete

NOISE = 2  # the way noise is drawn: a training goes on only with the same
PIECE = 1 << 16  # values: a few of them fit into the cache of a core


def gated(gate: HardConcrete, w: Tensor, alpha: Tensor) -> Tensor:
    """z ⊙ w with fresh noise, differentiable in both: `gate.sampled(alpha, u) * w`, u uniform.

    With the temperature β = 1 and t = e^−α (1 − u) / u,

        s = σ(log u − log(1 − u) + α) = 1 / (1 + t),   ∂s/∂α = s (1 − s)
    """
    if gate.temperature != 1.0 or alpha.dtype in (torch.float16, torch.bfloat16):  # near u = 1 these lose 1 − u
        return gate.sampled(alpha, torch.rand_like(alpha)) * w
    found: Tensor = _Gated.apply(w, alpha, gate)
    return found


def opened(gate: HardConcrete, alpha: Tensor) -> Tensor:
    """E‖z‖₀ = Σ σ(α − β log(−l / r)), a scalar, differentiable."""
    found: Tensor = _Opened.apply(alpha, gate.temperature * math.log(-gate.low / gate.high))
    return found


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, alpha: Tensor, gate: HardConcrete) -> Tensor:
        s, found = torch.empty_like(alpha), torch.empty_like(alpha)
        for own_s, own_w, own_alpha, own in _pieces(s, w, alpha, found):
            torch.rand(own_s.shape, out=own_s)
            own_s.clamp_(gate.edge, 1 - gate.edge)
            odds = (1 - own_s).div_(own_s)
            torch.mul(odds, torch.exp(-own_alpha), out=own_s).add_(1).reciprocal_()
            torch.mul(own_s, gate.high - gate.low, out=own)
            own.add_(gate.low).clamp_(0, 1).mul_(own_w)
        ctx.save_for_backward(w, s)
        ctx.gate = gate
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (g,) = gradients
        w, s = ctx.saved_tensors
        span = ctx.gate.high - ctx.gate.low
        g_w, g_alpha = torch.empty_like(w), torch.empty_like(w)
        for own_g, own_w, own_s, own_g_w, own_g_alpha in _pieces(g.contiguous(), w, s, g_w, g_alpha):
            z = own_s * span + ctx.gate.low
            inside = (z > 0) & (z < 1)
            torch.mul(own_g, z.clamp_(0, 1), out=own_g_w)
            torch.mul(own_g, own_w, out=own_g_alpha)
            own_g_alpha.mul_(own_s).mul_(1 - own_s).mul_(span).mul_(inside)
        return g_w, g_alpha, None


class _Opened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, alpha: Tensor, shift: float) -> Tensor:
        ctx.save_for_backward(alpha)
        ctx.shift = shift
        sums = [torch.sigmoid(own - shift).sum() for (own,) in _pieces(alpha)]
        return torch.stack(sums).sum() if sums else alpha.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (g,) = gradients
        (alpha,) = ctx.saved_tensors
        found = torch.empty_like(alpha)
        for own, into in _pieces(alpha, found):
            p = torch.sigmoid(own - ctx.shift)
            torch.mul(p, 1 - p, out=into)
            into.mul_(g)
        return found, None


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same part of each, one part after another; the tensors are contiguous and of one shape."""
    flat = [tensor.detach().view(-1) for tensor in tensors]
    count = len(flat[0])
    step = PIECE if flat[0].device.type == "cpu" else max(1, count)
    for start in range(0, count, step):
        yield tuple(tensor[start : start + step] for tensor in flat)
