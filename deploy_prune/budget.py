"""What a plan costs: parameters, multiply-accumulates and bytes, exactly, from the shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from deploy_prune.units import PER_HEAD, Axis, Site, SiteKind, UnitKind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deploy_prune.signature import Signature

Budget = Literal["sparsity", "params", "macs", "bytes"]
BUDGETS: tuple[str, ...] = get_args(Budget)
# What has to be measured on a runtime (deploy_prune/latency): milliseconds, and times as fast as the dense model.
Measured = Literal["latency", "speedup"]
MEASURED: tuple[str, ...] = get_args(Measured)
BYTES_PER_PARAMETER = 4  # compact models are stored in fp32

# How many units of each kind every site keeps: {"blocks.3.attn": {HEAD: 2}}.
Counts = Mapping[str, Mapping[UnitKind, int]]


@dataclass(frozen=True)
class LayerShape:
    """A layer before the cut: features made, features read, whether it has a bias, and positions it processes.

    `tokens` counts positions over all uses of the layer for the reference input; a bare parameter has 0, and costs no
    multiplications.
    """

    out: int
    inp: int
    bias: bool
    tokens: int

    def params(self, out: int, inp: int) -> int:
        return out * inp + (out if self.bias else 0)


@dataclass(frozen=True)
class CostModel:
    """Costs of the dense model and of any plan cut from it.

    `macs` are those of one reference input (batch 1) whose dynamic dimensions are `sizes`. `pairs` gives the query-key
    pairs that each attention site compares for it: one costs (query-key width + value width) per head. `alone` gives
    the parameters of the modules that leave with a site.
    """

    params: int
    macs: int
    layers: Mapping[str, LayerShape]
    pairs: Mapping[str, int]
    alone: Mapping[str, int]
    sizes: Mapping[str, int]

    @staticmethod
    def measure(
        model: nn.Module, sites: Sequence[Site], signature: Signature, inputs: Mapping[str, Tensor]
    ) -> CostModel:
        """Run `model` once on `inputs` (batch 1) and count. MACs are half of torch's FLOP counter."""
        from torch import nn

        from deploy_prune.layers import bias_of, layer_at, width

        found = {name: layer_at(model, name) for site in sites for name, _ in site.axes()}
        tokens = dict.fromkeys(found, 0)
        pairs = dict.fromkeys((s.name for s in sites if s.kind is SiteKind.ATTENTION), 0)
        own = {site.out: site.name for site in sites}
        handles = []
        for name, layer in found.items():
            if not isinstance(layer, nn.Module):
                continue

            def note(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                count = args[0][..., 0].numel()
                tokens[name] += count
                if own.get(name) in pairs:
                    pairs[own[name]] += count * args[0].shape[-2]

            handles.append(layer.register_forward_pre_hook(note))
        try:
            macs = count_macs(model, signature, inputs)
        finally:
            for handle in handles:
                handle.remove()
        for site in sites:  # timm's Swin v2 multiplies by qkv's weight without calling the layer
            for name, _ in site.axes():
                if isinstance(found[name], nn.Module):
                    tokens[name] = tokens[name] or tokens[site.out]
        layers = {
            name: LayerShape(width(layer, "out"), width(layer, "in"), bias_of(layer) is not None, tokens[name])
            for name, layer in found.items()
        }
        alone = {s.name: sum(count_params(model.get_submodule(m)) for m in s.alone) for s in sites}
        sizes = {
            d: inputs[spec.name].shape[i]
            for spec in signature.inputs
            for i, d in enumerate(spec.shape)
            if isinstance(d, str)
        }
        return CostModel(count_params(model), macs, layers, pairs, alone, sizes)

    def unit_params(self, site: Site, kind: UnitKind) -> int:
        """Parameters that leave with one slot of `kind` at `site` (qk, vo: one unit of every head) when nothing else is
        cut there."""
        slices = site.slices[kind]
        lanes = site.lanes(kind)
        total = 0
        for s in slices:
            shape = self.layers[s.layer]
            features = lanes * s.per_unit
            total += features * (shape.inp + shape.bias if s.axis == "out" else shape.out)
        return total

    def prunable(self, sites: Sequence[Site], kinds: Sequence[UnitKind] | None = None) -> int:
        """Parameters that lie in units of the given kinds: what a sparsity of 1 would remove. Those that belong to
        units of two kinds (a head and its dimensions) count once; what leaves with a whole site counts too."""
        total = 0
        for site in sites:
            counts = {k: 0 if kinds is None or k in kinds else n for k, n in site.counts.items()}
            total += self._site_params(site, site.counts) - self._site_params(site, counts)
        return total

    def params_of(self, sites: Sequence[Site], counts: Counts) -> int:
        """Parameters of the compact model."""
        return self.params - sum(self._site_params(s, s.counts) - self._site_params(s, counts[s.name]) for s in sites)

    def macs_of(self, sites: Sequence[Site], counts: Counts) -> int:
        """MACs of the compact model on the reference input."""
        return self.macs - sum(self._site_macs(s, s.counts) - self._site_macs(s, counts[s.name]) for s in sites)

    def _widths(self, site: Site, counts: Mapping[UnitKind, int]) -> dict[str, tuple[int, int]]:
        """(features made, features read) of every layer of a site. Kinds share features: what head h of n keeps of its
        width w is n·w, so a layer's width is the product of the kept shares."""
        widths = {}
        for layer in dict.fromkeys(name for name, _ in site.axes()):
            shape = self.layers[layer]
            widths[layer] = (
                self._kept(site, layer, "out", shape.out, counts),
                self._kept(site, layer, "in", shape.inp, counts),
            )
        return widths

    def _kept(self, site: Site, layer: str, axis: Axis, full: int, counts: Mapping[UnitKind, int]) -> int:
        """Features that stay on one axis: those of no kind, and of each part the product of its kinds' kept counts."""
        heads = site.counts.get(UnitKind.HEAD, 0)
        kept_heads = counts.get(UnitKind.HEAD, heads)
        left = full
        own = {k: [s for s in v if (s.layer, s.axis) == (layer, axis)] for k, v in site.slices.items()}
        inner = 0  # features of one head that qk and vo units own here
        inner_kept = 0
        for kind in PER_HEAD:
            for s in own.get(kind, ()):
                inner += site.counts[kind] * s.per_unit
                inner_kept += counts[kind] * s.per_unit
        for kind, slices in own.items():
            if kind in PER_HEAD:
                continue
            for s in slices:
                left -= (site.counts[kind] - counts[kind]) * s.per_unit
        return left - kept_heads * (inner - inner_kept)

    def _units_params(self, site: Site, counts: Mapping[UnitKind, int]) -> int:
        return sum(self.layers[m].params(*w) for m, w in self._widths(site, counts).items())

    def _site_params(self, site: Site, counts: Mapping[UnitKind, int]) -> int:
        if counts[site.vanishing_kind]:
            return self._units_params(site, counts) + self.alone[site.name]
        out = self.layers[site.out]
        return out.out if out.bias else 0

    def _site_macs(self, site: Site, counts: Mapping[UnitKind, int]) -> int:
        if not counts[site.vanishing_kind]:
            return 0
        macs = sum(self.layers[m].tokens * out * inp for m, (out, inp) in self._widths(site, counts).items())
        if site.kind is SiteKind.ATTENTION:
            heads = counts[UnitKind.HEAD] * site.query_heads_per_unit
            widths = [
                full * counts[kind] // site.counts[kind] if kind in site.counts else full
                for kind, full in ((UnitKind.QK, site.qk_width), (UnitKind.VO, site.vo_width))
            ]
            macs += heads * sum(widths) * self.pairs[site.name]
        return macs

    def to_json(self) -> dict[str, Any]:
        return {
            "params": self.params,
            "macs": self.macs,
            "pairs": dict(self.pairs),
            "alone": dict(self.alone),
            "sizes": dict(self.sizes),
            "layers": {name: asdict(shape) for name, shape in self.layers.items()},
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> CostModel:
        return CostModel(
            data["params"],
            data["macs"],
            {n: LayerShape(**s) for n, s in data["layers"].items()},
            data["pairs"],
            data["alone"],
            data["sizes"],
        )


def count_params(model: nn.Module) -> int:
    """Parameters of `model`, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, signature: Signature, inputs: Mapping[str, Tensor]) -> int:
    """Multiply-accumulates of one forward pass: matrix products, convolutions and attention, by torch's counter.

    Attention runs as plain matrix products meanwhile: some torch versions do not count their fused CPU kernel.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:  # the counter stumbles over an expanded parameter (timm's latent query)
            p.requires_grad_(False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            signature.call(model, inputs)
    finally:
        for p in trained:
            p.requires_grad_(True)
    return counter.get_total_flops() // 2
