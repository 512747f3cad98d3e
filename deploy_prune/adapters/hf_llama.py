"""HF Llama decoders: grouped queries, rotary embedding, gated feed-forward, tied or untied embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploy_prune.adapters.base import Adapter, attention_site, checked, feed_forward_site, module_at
from deploy_prune.units import Site, SiteKind, UnitKind

if TYPE_CHECKING:
    from torch import nn


class HfLlama(Adapter):
    name = "hf-llama"

    def matches(self, model: nn.Module) -> bool:
        from transformers import LlamaPreTrainedModel

        return isinstance(model, LlamaPreTrainedModel)

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

        sites: list[Site] = []
        problems: list[str] = []
        for name, layer in model.named_modules():
            if not isinstance(layer, LlamaDecoderLayer):
                continue
            attention, mlp = layer.self_attn, layer.mlp
            if type(attention) is not LlamaAttention:
                problems.append(f"{name}.self_attn: {type(attention).__name__}, expected LlamaAttention")
            else:
                own = f"{name}.self_attn"
                sites.append(
                    attention_site(
                        own,
                        heads=attention.q_proj.out_features // attention.head_dim,
                        kv_heads=attention.k_proj.out_features // attention.head_dim,
                        head_dim=attention.head_dim,
                        query=f"{own}.q_proj",
                        key=f"{own}.k_proj",
                        value=f"{own}.v_proj",
                        out=f"{own}.o_proj",
                    )
                )
            if type(mlp) is not LlamaMLP:
                problems.append(f"{name}.mlp: {type(mlp).__name__}, expected LlamaMLP")
            else:
                own = f"{name}.mlp"
                sites.append(
                    feed_forward_site(
                        own,
                        neurons=mlp.down_proj.in_features,
                        out=f"{own}.down_proj",
                        inputs=(f"{own}.gate_proj", f"{own}.up_proj"),
                    )
                )
        return checked(model, self.name, sites, problems)

    def resize(self, model: nn.Module, site: Site, kept: dict[UnitKind, int]) -> None:
        """Whole groups leave, so `num_key_value_groups` stays true; LlamaAttention reads widths off its layers."""
        if site.kind is SiteKind.FEED_FORWARD:
            module_at(model, site.name).intermediate_size = kept[UnitKind.NEURON]
