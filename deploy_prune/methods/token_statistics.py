"""What the tokens say of a site: second moments of what its output projection reads, and of its queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deploy_prune.activations import Watch, watching
from deploy_prune.layers import layer_at, width
from deploy_prune.methods.base import Context
from deploy_prune.refitting import SiteMoments
from deploy_prune.tasks.base import Batch
from deploy_prune.units import Site, UnitKind

LABEL = "token moments"


@dataclass(frozen=True)
class TokenMoments:
    """Moments by site name: of the output projection's input, and where there are qk units of queries and keys.

    Queries and keys are (kv heads · slots · features of a unit) long, in the order of the units' own tables.
    """

    out: dict[str, SiteMoments]
    query: dict[str, SiteMoments]
    key: dict[str, SiteMoments]


@torch.no_grad()
def token_moments(context: Context) -> TokenMoments:
    """One forward pass over the calibration subset: E[x] and E[xxᵀ] in float64, padding left out, streamed."""

    def step(batch: Batch) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}

        def see(name: str, x: Tensor) -> None:
            x = x.float()
            sums[f"{name}|n"] = torch.tensor(float(len(x)), dtype=torch.float64)
            sums[f"{name}|x"] = x.sum(0, dtype=torch.float64)
            sums[f"{name}|xx"] = (x.T @ x).double()

        with (
            watching(context.model, context.sites, lambda name, x: see(f"out|{name}", x)) as watch,
            _watching_logits(context.model, context.sites, watch, see),
        ):
            watch.attend(context.task.signature, batch.inputs)
            context.output(batch)
        return sums

    sums, _ = context.accumulate(LABEL, step)

    def of(part: str) -> dict[str, SiteMoments]:
        found = {}
        for site in context.sites:
            name = f"{part}|{site.name}"
            if f"{name}|n" in sums:
                n = sums[f"{name}|n"].cpu()
                found[site.name] = SiteMoments(int(n), sums[f"{name}|x"].cpu() / n, sums[f"{name}|xx"].cpu() / n)
        return found

    return TokenMoments(of("out"), of("query"), of("key"))


def logit_moments(site: Site, moments: TokenMoments) -> Tensor:
    """H of a site's qk units, (kv heads, slots, slots): the second moments of their parts of the attention logit.

    The logit of a query and a key is Σ_d z_d with z_d = q_d · k_d. Over pairs of independent tokens
        H_de = E[z_d z_e] = E[q_d q_e] E[k_d k_e],
    summed over the query heads that share the key. Under rotary embedding a unit is a pair of features that turns by an
    angle of its own: averaged over angles only H_dd = ½ E‖q_d‖² E‖k_d‖² is left.
    """
    q, k = moments.query[site.name].second, moments.key[site.name].second
    lanes, slots = site.lanes(UnitKind.QK), site.counts[UnitKind.QK]
    own_q, own_k = (s.per_unit for s in site.slices[UnitKind.QK][:2])
    group = own_q // own_k
    Q = q.view(lanes, slots, group, own_k, lanes, slots, group, own_k)
    K = k.view(lanes, slots, own_k, lanes, slots, own_k)
    H = torch.zeros(lanes, slots, slots, dtype=torch.float64)
    for lane in range(lanes):
        for g in range(group):
            C_q, C_k = Q[lane, :, g, :, lane, :, g, :], K[lane, :, :, lane, :, :]  # (slots, own, slots, own)
            if own_k == 1:
                H[lane] += C_q[:, 0, :, 0] * C_k[:, 0, :, 0]
            else:
                energy = [torch.einsum("sisi->s", C) for C in (C_q, C_k)]
                H[lane] += torch.diag(energy[0] * energy[1] / 2)
    return H


@contextmanager
def _watching_logits(
    model: nn.Module, sites: tuple[Site, ...], watch: Watch, see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Within the block `see("query|SITE", x)` and `see("key|SITE", x)` receive the valid queries and keys."""
    with ExitStack() as stack:
        for site in sites:
            if UnitKind.QK not in site.counts:
                continue
            for part, s in zip(("query", "key"), site.slices[UnitKind.QK], strict=False):
                layer = layer_at(model, s.layer)
                assert isinstance(layer, nn.Module) and s.axis == "out"
                table = torch.from_numpy(s.table(site.lanes(UnitKind.QK), site.counts[UnitKind.QK])).reshape(-1)
                assert int(table.max()) < width(layer, "out")

                def hook(
                    _: nn.Module, __: object, output: Tensor, name: str = f"{part}|{site.name}", own: Tensor = table
                ) -> None:
                    x = output.detach()
                    x = x.reshape(-1, x.shape[-1]) if watch.valid is None else x[watch.valid]
                    see(name, x[:, own.to(x.device)])

                stack.callback(layer.register_forward_hook(hook).remove)
        yield
