"""HF decoders of the Llama outline: grouped queries, rotary embedding, gated feed-forward, tied or untied embeddings.

Llama (and SmolLM, SmolLM2, MobileLLM's shape), Mistral, Qwen2, Qwen3, SmolLM3; blocks may be shared by several depths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deploy_prune.adapters.base import NORMED, attention_site, feed_forward_site, module_at
from deploy_prune.adapters.hf_families import Family, HfAdapter, qk_width, vo_width
from deploy_prune.units import Site, SiteKind, UnitKind

if TYPE_CHECKING:
    from torch import Tensor, nn


class HfLlama(HfAdapter):
    name = "hf-llama"
    families = (
        Family("llama", "Llama"),
        Family("mistral", "Mistral"),
        Family("qwen2", "Qwen2"),
        Family("qwen3", "Qwen3"),
        Family("smollm3", "SmolLM3"),
    )
    attention = "self_attn"
    feed_forward = "mlp"

    def layer_class(self, family: Family) -> type[nn.Module]:
        return family.cls("DecoderLayer")

    def attention_class(self, family: Family) -> type[nn.Module]:
        return family.cls("Attention")

    def feed_forward_class(self, family: Family) -> type[nn.Module]:
        return family.cls("MLP")

    def forward(self) -> Callable[..., Any]:
        from deploy_prune.adapters.modules.hf_llama import forward

        return forward

    def attention_site(self, name: str, layer: Any, attention: Any) -> Site:
        from deploy_prune.adapters.modules.hf_llama import is_rotary

        own = f"{name}.self_attn"
        head_dim = qk_width(attention, attention.head_dim)
        norms = (f"{own}.q_norm", f"{own}.k_norm") if hasattr(attention, "q_norm") else ()
        return attention_site(
            own,
            heads=attention.q_proj.out_features // head_dim,
            kv_heads=attention.k_proj.out_features // head_dim,
            head_dim=head_dim,
            vo_width=vo_width(attention, attention.head_dim),
            rotary=is_rotary(attention),
            query=f"{own}.q_proj",
            key=f"{own}.k_proj",
            value=f"{own}.v_proj",
            out=f"{own}.o_proj",
            alone=(f"{name}.input_layernorm", *norms),
            limits={UnitKind.QK: NORMED} if norms else None,
        )

    def feed_forward_site(self, name: str, layer: Any) -> Site:
        own = f"{name}.mlp"
        return feed_forward_site(
            own,
            neurons=layer.mlp.down_proj.in_features,
            out=f"{own}.down_proj",
            inputs=(f"{own}.gate_proj", f"{own}.up_proj"),
            alone=(f"{name}.post_attention_layernorm",),
        )

    def set_heads(self, attention: Any, heads: int) -> None:
        """Whole groups leave, so `num_key_value_groups` stays true; the attention reads heads off its layers."""

    def resize(self, model: nn.Module, site: Site, kept: Mapping[UnitKind, Sequence[int]]) -> None:
        super().resize(model, site, kept)
        if site.kind is SiteKind.FEED_FORWARD:
            module_at(model, site.name).intermediate_size = len(kept[UnitKind.NEURON])
            return
        from deploy_prune.adapters.modules.hf_attention import keep_pairs
        from deploy_prune.adapters.modules.hf_llama import is_rotary

        attention = module_at(model, site.name)
        if hasattr(attention, "qk_width") and UnitKind.QK in site.counts and is_rotary(attention):
            keep_pairs(attention, list(kept[UnitKind.HEAD]), list(kept[UnitKind.QK]), site.counts[UnitKind.QK])

    def vanish(self, model: nn.Module, site: Site, bias: Tensor | None) -> None:
        from deploy_prune.adapters.modules.vanished import Vanished

        if site.kind is SiteKind.ATTENTION:
            gone = Vanished(bias, extra=1, layer_idx=module_at(model, site.name).layer_idx)
        else:
            gone = Vanished(bias)
        model.set_submodule(site.name, gone)
