"""What the attention distributions of every head say of it.

The distributions are those that the model itself computes: its calls of torch's attention kernel and of softmax are
seen on their way, so that scale, masks, rotary embedding and position biases are whatever the model uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from deploy_prune.activations import Watch
from deploy_prune.errors import UnsupportedModelError
from deploy_prune.methods.base import Context
from deploy_prune.tasks.base import Batch
from deploy_prune.units import Site, SiteKind

AttentionMeasure = Literal["variance", "variance-over-queries", "entropy"]
_SOFTMAX = {functional.softmax, torch.softmax, Tensor.softmax}


@torch.no_grad()
def attention_scores(context: Context, measure: AttentionMeasure) -> dict[str, Tensor]:
    """A score >= 0 per head unit by site name, (units,) float64; low says that the head attends alike everywhere.

    With p_ij the weight that query i gives key j, and n_i the number of keys that it may see:
        variance:               mean over queries and examples of  Σ_j (p_ij − 1/n_i)²,  n_i times the variance over
                                keys: 0 where a head only averages what it sees
        variance-over-queries:  mean over examples of  Σ_j Var_i p_ij:  0 where every query gets the same answer
        entropy:                mean over queries and examples of  1 − H_i / log n_i,  H_i = −Σ_j p_ij log p_ij

    Padding is left out. Under grouped queries a unit has the sum over its heads, blocks that serve several depths the
    mean over them. Raises UnsupportedModelError naming a site whose distributions were not seen.
    """

    def step(batch: Batch) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}

        def see(name: str, p: Tensor, valid: Tensor | None) -> None:
            total, count = measured(p.float(), valid, measure)
            for part, value in (("sum", total), ("count", count)):
                key = f"{name}|{part}"
                sums[key] = sums[key] + value if key in sums else value

        with watching_attention(context.model, context.sites, see) as watch:
            watch.attend(context.task.signature, batch.inputs)
            context.output(batch)
        return sums

    sums, _ = context.accumulate(f"attention: {measure}", step)
    scores = {}
    for site in (s for s in context.sites if s.kind is SiteKind.ATTENTION):
        of_head = (sums[f"{site.name}|sum"] / sums[f"{site.name}|count"]).cpu()
        scores[site.name] = of_head.view(site.kv_heads, -1).sum(1)
    return scores


def measured(p: Tensor, valid: Tensor | None, measure: AttentionMeasure) -> tuple[Tensor, Tensor]:
    """(Σ of the measure by head (heads,) float64, number of summands) of p (rows, heads, queries, keys).

    `valid` (rows, queries) says which queries count, None: all. A key counts where its weight is not 0.
    """
    if valid is None:
        valid = torch.ones(p.shape[0], p.shape[2], dtype=torch.bool, device=p.device)
    counts = valid[:, None, :].to(p.dtype)
    if measure == "variance-over-queries":
        n = counts.sum(2, keepdim=True).clamp(min=1)[..., None]
        weight = counts[..., None]
        mean = (p * weight).sum(2, keepdim=True) / n
        spread = ((p - mean).square() * weight / n).sum((2, 3))
        return spread.double().sum(0), p.new_tensor(len(p), dtype=torch.float64)
    keys = (p > 0).sum(-1).clamp(min=1).double()
    if measure == "variance":
        each = (p.square().sum(-1).double() - 1 / keys).clamp(min=0)
    else:
        H = torch.special.entr(p).sum(-1).double()
        each = torch.where(keys > 1, (1 - H / keys.clamp(min=2).log()).clamp(min=0), torch.zeros_like(H))
    return (each * counts).sum((0, 2)), counts.double().sum()


@contextmanager
def watching_attention(
    model: nn.Module, sites: tuple[Site, ...], see: Callable[[str, Tensor, Tensor | None], None]
) -> Iterator[Watch]:
    """Within the block `see(site, p, valid)` receives every attention site's distributions p (rows, heads, queries,
    keys) and which queries (rows, queries) are no padding, None where all are. Raises UnsupportedModelError."""
    watch, recorder = Watch(), _Recorder()

    def hook_for(site: Site) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, __: Any) -> None:
            p = recorder.take()
            if p is None or p.dim() != 4 or p.shape[1] != site.heads:
                raise UnsupportedModelError(
                    "the attention distributions of a site were not seen",
                    where=site.name,
                    expected=f"(rows, {site.heads} heads, queries, keys), by torch's attention or softmax",
                    got="none" if p is None else f"shape {tuple(p.shape)}",
                    remedy="Use another search, or score heads by taylor; set_attn_implementation('sdpa') may help.",
                )
            valid = watch.valid
            see(site.name, p, valid if valid is not None and valid.shape == (p.shape[0], p.shape[2]) else None)

        return hook

    with ExitStack() as stack:
        for site in sites:
            if site.kind is SiteKind.ATTENTION:
                stack.callback(model.get_submodule(site.out).register_forward_pre_hook(hook_for(site)).remove)
        stack.enter_context(recorder)
        yield watch


class _Recorder(TorchFunctionMode):
    """Remembers the last attention that was computed: its kernel's arguments, or the result of its softmax."""

    def __init__(self) -> None:
        super().__init__()
        self._last: Callable[[], Tensor] | None = None

    def take(self) -> Tensor | None:
        """The distributions of the last attention since the last call, None without one."""
        last, self._last = self._last, None
        with torch._C.DisableTorchFunction():
            return None if last is None else last()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            self._last = lambda: distributions(*args, **kwargs)
        elif func in _SOFTMAX and result.dim() == 4:
            self._last = lambda: result
        return result


def distributions(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale · q kᵀ + mask) for the arguments of torch's scaled_dot_product_attention: (rows, heads, queries,
    keys) float32. A query that may see no key has zeros."""
    q, k = query.float(), key.float()
    if enable_gqa and q.shape[1] != k.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
        logits = logits.masked_fill(~seen, -torch.inf)
    if attn_mask is not None:
        logits = (
            logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask.float()
        )
    return logits.softmax(-1).nan_to_num(0.0)
