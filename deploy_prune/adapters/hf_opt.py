"""HF OPT decoders: learned positions, biases, a feed-forward that lies in the layer itself, norms before or after."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deploy_prune.adapters.base import attention_site, feed_forward_site, module_at
from deploy_prune.adapters.hf_families import Family, HfAdapter, qk_width, vo_width
from deploy_prune.units import Site, SiteKind

if TYPE_CHECKING:
    from torch import Tensor, nn


class HfOpt(HfAdapter):
    name = "hf-opt"
    families = (Family("opt", "OPT"),)
    attention = "self_attn"
    feed_forward = "fc1"

    def layer_class(self, family: Family) -> type[nn.Module]:
        return family.cls("DecoderLayer")

    def attention_class(self, family: Family) -> type[nn.Module]:
        return family.cls("Attention")

    def feed_forward_class(self, family: Family) -> type[nn.Module]:
        from torch import nn

        return nn.Linear

    def forward(self) -> Callable[..., Any]:
        from deploy_prune.adapters.modules.hf_opt import forward

        return forward

    def attention_site(self, name: str, layer: Any, attention: Any) -> Site:
        own = f"{name}.self_attn"
        return attention_site(
            own,
            heads=attention.num_heads,
            head_dim=qk_width(attention, attention.head_dim),
            vo_width=vo_width(attention, attention.head_dim),
            query=f"{own}.q_proj",
            key=f"{own}.k_proj",
            value=f"{own}.v_proj",
            out=f"{own}.out_proj",
            alone=_norm(layer, f"{name}.self_attn_layer_norm"),
        )

    def feed_forward_site(self, name: str, layer: Any) -> Site:
        return feed_forward_site(
            f"{name}.ffn",
            neurons=layer.fc1.out_features,
            out=f"{name}.fc2",
            inputs=(f"{name}.fc1",),
            alone=_norm(layer, f"{name}.final_layer_norm"),
        )

    def set_heads(self, attention: Any, heads: int) -> None:
        attention.num_heads = heads

    def vanish(self, model: nn.Module, site: Site, bias: Tensor | None) -> None:
        from torch import nn

        from deploy_prune.adapters.modules.vanished import Passing, Vanished

        if site.kind is SiteKind.ATTENTION:
            place = module_at(model, site.name).layer_idx
            model.set_submodule(site.name, Vanished(bias, extra=1, layer_idx=place))
            return
        layer = module_at(model, site.name.rpartition(".")[0])
        layer.fc1, layer.activation_fn, layer.fc2 = Passing(), nn.Identity(), Vanished(bias)


def _norm(layer: Any, name: str) -> tuple[str, ...]:
    """A norm before the sublayer is its own; one after the sum serves the residual stream too and stays."""
    return (name,) if layer.do_layer_norm_before else ()
