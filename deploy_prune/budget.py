"""What a plan costs: parameters, multiply-accumulates and bytes, exactly, from the shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from deploy_prune.units import Site, SiteKind, UnitKind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deploy_prune.signature import Signature

Budget = Literal["sparsity", "params", "macs", "bytes"]
BUDGETS: tuple[str, ...] = get_args(Budget)
BYTES_PER_PARAMETER = 4  # compact models are stored in fp32

# How many units of each kind every site keeps: {"blocks.3.attn": {HEAD: 2}}.
Counts = Mapping[str, Mapping[UnitKind, int]]


@dataclass(frozen=True)
class LayerShape:
    """A linear layer before the cut: features made, features read, and whether it has a bias."""

    out: int
    inp: int
    bias: bool

    def params(self, out: int, inp: int) -> int:
        return out * inp + (out if self.bias else 0)


@dataclass(frozen=True)
class CostModel:
    """Costs of the dense model and of any plan cut from it.

    `macs` are those of one reference input (batch 1) whose dynamic dimensions are `sizes`; `tokens` gives the
    positions each site processes for it. An attention product costs tokens² · (query-key width + value width) per head.
    """

    params: int
    macs: int
    layers: Mapping[str, LayerShape]
    tokens: Mapping[str, int]
    sizes: Mapping[str, int]

    @staticmethod
    def measure(
        model: nn.Module, sites: Sequence[Site], signature: Signature, inputs: Mapping[str, Tensor]
    ) -> CostModel:
        """Run `model` once on `inputs` (batch 1) and count. MACs are half of torch's FLOP counter."""
        import torch

        tokens: dict[str, int] = {}
        handles = []
        for site in sites:

            def note(_: nn.Module, args: tuple[Tensor, ...], name: str = site.name) -> None:
                tokens[name] = args[0][..., 0].numel()

            handles.append(model.get_submodule(site.out).register_forward_pre_hook(note))
        try:
            macs = count_macs(model, signature, inputs)
        finally:
            for handle in handles:
                handle.remove()
        layers = {}
        for site in sites:
            for slices in site.slices.values():
                for s in slices:
                    linear = model.get_submodule(s.module)
                    assert isinstance(linear, torch.nn.Linear)
                    layers[s.module] = LayerShape(linear.out_features, linear.in_features, linear.bias is not None)
        sizes = {
            d: inputs[spec.name].shape[i]
            for spec in signature.inputs
            for i, d in enumerate(spec.shape)
            if isinstance(d, str)
        }
        return CostModel(count_params(model), macs, layers, tokens, sizes)

    def unit_params(self, site: Site, kind: UnitKind) -> int:
        """Parameters that leave with one unit of `kind` at `site` when nothing else is cut there."""
        full = dict(site.counts)
        return self._site_params(site, full) - self._site_params(site, {**full, kind: full[kind] - 1})

    def prunable(self, sites: Sequence[Site], kinds: Sequence[UnitKind] | None = None) -> int:
        """Parameters that lie in units of the given kinds: what a sparsity of 1 would remove."""
        return sum(self.unit_params(s, k) * s.counts[k] for s in sites for k in s.counts if kinds is None or k in kinds)

    def params_of(self, sites: Sequence[Site], counts: Counts) -> int:
        """Parameters of the compact model."""
        return self.params - sum(self._site_params(s, s.counts) - self._site_params(s, counts[s.name]) for s in sites)

    def macs_of(self, sites: Sequence[Site], counts: Counts) -> int:
        """MACs of the compact model on the reference input."""
        return self.macs - sum(self._site_macs(s, s.counts) - self._site_macs(s, counts[s.name]) for s in sites)

    def _widths(self, site: Site, counts: Mapping[UnitKind, int]) -> dict[str, tuple[int, int]]:
        widths = {
            s.module: (self.layers[s.module].out, self.layers[s.module].inp)
            for slices in site.slices.values()
            for s in slices
        }
        for kind, slices in site.slices.items():
            for s in slices:
                out, inp = widths[s.module]
                gone = (site.counts[kind] - counts[kind]) * s.block * s.parts
                widths[s.module] = (out - gone, inp) if s.axis == "out" else (out, inp - gone)
        return widths

    def _site_params(self, site: Site, counts: Mapping[UnitKind, int]) -> int:
        return sum(self.layers[m].params(*w) for m, w in self._widths(site, counts).items())

    def _site_macs(self, site: Site, counts: Mapping[UnitKind, int]) -> int:
        tokens = self.tokens[site.name]
        macs = sum(tokens * out * inp for out, inp in self._widths(site, counts).values())
        if site.kind is SiteKind.ATTENTION:
            heads = counts[UnitKind.HEAD] * site.query_heads_per_unit
            macs += heads * 2 * site.head_dim * tokens * tokens
        return macs

    def to_json(self) -> dict[str, Any]:
        return {
            "params": self.params,
            "macs": self.macs,
            "tokens": dict(self.tokens),
            "sizes": dict(self.sizes),
            "layers": {name: asdict(shape) for name, shape in self.layers.items()},
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> CostModel:
        return CostModel(
            data["params"],
            data["macs"],
            {n: LayerShape(**s) for n, s in data["layers"].items()},
            data["tokens"],
            data["sizes"],
        )


def count_params(model: nn.Module) -> int:
    """Parameters of `model`, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, signature: Signature, inputs: Mapping[str, Tensor]) -> int:
    """Multiply-accumulates of one forward pass: matrix products, convolutions and attention, by torch's counter."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        signature.call(model, inputs)
    return counter.get_total_flops() // 2
