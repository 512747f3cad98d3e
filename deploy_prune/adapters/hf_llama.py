"""HF Llama decoders: grouped queries, rotary embedding, gated feed-forward, tied or untied embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from deploy_prune.adapters.base import Adapter, attention_site, checked, feed_forward_site, module_at, uneven_widths
from deploy_prune.units import Site, SiteKind, UnitKind

if TYPE_CHECKING:
    from torch import Tensor, nn


class HfLlama(Adapter):
    name = "hf-llama"

    def matches(self, model: nn.Module) -> bool:
        from transformers import LlamaPreTrainedModel

        return isinstance(model, LlamaPreTrainedModel)

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

        from deploy_prune.adapters.modules.hf_llama import UnevenLlamaAttention
        from deploy_prune.adapters.modules.vanished import Vanished

        sites: list[Site] = []
        problems: list[str] = []
        for name, layer in model.named_modules():
            if not isinstance(layer, LlamaDecoderLayer):
                continue
            attention, mlp = layer.self_attn, layer.mlp
            if type(attention) is Vanished:
                pass
            elif type(attention) not in (LlamaAttention, UnevenLlamaAttention):
                problems.append(f"{name}.self_attn: {type(attention).__name__}, expected LlamaAttention")
            else:
                own = f"{name}.self_attn"
                qk_width = getattr(attention, "qk_width", attention.head_dim)
                sites.append(
                    attention_site(
                        own,
                        heads=attention.q_proj.out_features // qk_width,
                        kv_heads=attention.k_proj.out_features // qk_width,
                        head_dim=qk_width,
                        vo_width=getattr(attention, "vo_width", attention.head_dim),
                        rotary=True,
                        query=f"{own}.q_proj",
                        key=f"{own}.k_proj",
                        value=f"{own}.v_proj",
                        out=f"{own}.o_proj",
                        alone=(f"{name}.input_layernorm",),
                    )
                )
            if type(mlp) is Vanished:
                pass
            elif type(mlp) is not LlamaMLP:
                problems.append(f"{name}.mlp: {type(mlp).__name__}, expected LlamaMLP")
            else:
                own = f"{name}.mlp"
                sites.append(
                    feed_forward_site(
                        own,
                        neurons=mlp.down_proj.in_features,
                        out=f"{own}.down_proj",
                        inputs=(f"{own}.gate_proj", f"{own}.up_proj"),
                        alone=(f"{name}.post_attention_layernorm",),
                    )
                )
        return checked(model, self.name, sites, problems)

    def resize(self, model: nn.Module, site: Site, kept: Mapping[UnitKind, Sequence[int]]) -> None:
        """Whole groups leave, so `num_key_value_groups` stays true; LlamaAttention reads widths off its layers."""
        if site.kind is SiteKind.FEED_FORWARD:
            module_at(model, site.name).intermediate_size = len(kept[UnitKind.NEURON])
            return
        from deploy_prune.adapters.modules.hf_attention import keep_pairs
        from deploy_prune.adapters.modules.hf_llama import UnevenLlamaAttention

        attention = module_at(model, site.name)
        if uneven_widths(attention, site, kept, UnevenLlamaAttention):
            keep_pairs(attention, list(kept[UnitKind.HEAD]), list(kept[UnitKind.QK]), site.counts[UnitKind.QK])

    def vanish(self, model: nn.Module, site: Site, bias: Tensor | None) -> None:
        from deploy_prune.adapters.modules.vanished import Vanished

        model.set_submodule(site.name, Vanished(bias, extra=int(site.kind is SiteKind.ATTENTION)))
