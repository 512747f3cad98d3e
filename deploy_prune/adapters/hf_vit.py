"""HF vision transformers of the ViT outline: ViT, DeiT, DINOv2, CLIP's two towers, Swin."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from deploy_prune.adapters.base import attention_site, feed_forward_site
from deploy_prune.adapters.hf_families import Family, HfAdapter, qk_width, vo_width
from deploy_prune.errors import UnsupportedModelError
from deploy_prune.units import Site, SiteKind, Slice

if TYPE_CHECKING:
    from torch import Tensor, nn


class HfViT(HfAdapter):
    """A norm before every sublayer, three projections, two linear layers in the feed-forward."""

    name = "hf-vit"
    families: ClassVar[tuple[Family, ...]] = (Family("vit", "ViT"), Family("deit", "DeiT"))
    attention = "attention"
    feed_forward = "mlp"
    norms: ClassVar[tuple[str, str]] = ("layernorm_before", "layernorm_after")
    out: ClassVar[str] = "o_proj"

    def layer_class(self, family: Family) -> type[nn.Module]:
        return family.cls("Layer")

    def attention_class(self, family: Family) -> type[nn.Module]:
        return family.cls("Attention")

    def feed_forward_class(self, family: Family) -> type[nn.Module]:
        return family.cls("MLP")

    def forward(self) -> Callable[..., Any]:
        from deploy_prune.adapters.modules.hf_vit import forward

        return forward

    def attention_site(self, name: str, layer: Any, attention: Any) -> Site:
        own = f"{name}.{self.attention}"
        head_dim = qk_width(attention, attention.head_dim)
        return attention_site(
            own,
            heads=attention.q_proj.out_features // head_dim,
            head_dim=head_dim,
            vo_width=vo_width(attention, attention.head_dim),
            query=f"{own}.q_proj",
            key=f"{own}.k_proj",
            value=f"{own}.v_proj",
            out=f"{own}.{self.out}",
            alone=(f"{name}.{self.norms[0]}",),
            with_heads=self.with_heads(own),
        )

    def with_heads(self, attention: str) -> tuple[Slice, ...]:
        """What else leaves with a head of the attention called so."""
        return ()

    def feed_forward_site(self, name: str, layer: Any) -> Site:
        return self._feed_forward(name, layer.mlp.fc2, "fc2", "fc1")

    def _feed_forward(self, name: str, last: Any, out: str, *inputs: str) -> Site:
        return feed_forward_site(
            f"{name}.mlp",
            neurons=last.in_features,
            out=f"{name}.mlp.{out}",
            inputs=tuple(f"{name}.mlp.{layer}" for layer in inputs),
            alone=(f"{name}.{self.norms[1]}",),
        )

    def set_heads(self, attention: Any, heads: int) -> None:
        attention.num_attention_heads = heads

    def vanish(self, model: nn.Module, site: Site, bias: Tensor | None) -> None:
        from deploy_prune.adapters.modules.vanished import Vanished

        model.set_submodule(site.name, Vanished(bias, extra=int(site.kind is SiteKind.ATTENTION)))

    def untouched(self, model: nn.Module) -> list[tuple[str, str]]:
        return [(name, why) for name, module in model.named_modules() if (why := _reason(name, module))]


class HfDinov2(HfViT):
    """LayerScale after every sublayer, plain or gated feed-forward."""

    name = "hf-dinov2"
    families = (Family("dinov2", "Dinov2"), Family("dinov2_with_registers", "Dinov2WithRegisters"))
    norms = ("norm1", "norm2")

    def attention_site(self, name: str, layer: Any, attention: Any) -> Site:
        if not hasattr(attention, "q_proj"):  # until transformers 5.17 its projections lay in modules of their own
            import transformers

            raise UnsupportedModelError(
                "DINOv2 is understood as transformers has had it since 5.18",
                where=f"{name}.{self.attention}",
                got=f"transformers {transformers.__version__}",
                remedy="pip install 'transformers>=5.18'; timm's DINOv2 works with any.",
            )
        return super().attention_site(name, layer, attention)

    def feed_forward_classes(self, family: Family) -> tuple[type[nn.Module], ...]:
        return family.cls("MLP"), family.cls("SwiGLUFFN")

    def feed_forward_site(self, name: str, layer: Any) -> Site:
        if type(layer.mlp).__name__.endswith("SwiGLUFFN"):
            return self._feed_forward(name, layer.mlp.down_proj, "down_proj", "gate_proj", "up_proj")
        return super().feed_forward_site(name, layer)


class HfClip(HfViT):
    """Both towers of CLIP, together or apart; their projections into the common space stay."""

    name = "hf-clip"
    families = (Family("clip", "CLIP"),)
    attention = "self_attn"
    norms = ("layer_norm1", "layer_norm2")
    out = "out_proj"

    def layer_class(self, family: Family) -> type[nn.Module]:
        return family.cls("EncoderLayer")

    def forward(self) -> Callable[..., Any]:
        from deploy_prune.adapters.modules.hf_vit import clip_forward

        return clip_forward

    def set_heads(self, attention: Any, heads: int) -> None:
        attention.num_heads = heads


class HfSwin(HfViT):
    """Attention within windows; a column of the table of position biases leaves with its head."""

    name = "hf-swin"
    families = (Family("swin", "Swin"),)

    def forward(self) -> Callable[..., Any]:
        from deploy_prune.adapters.modules.hf_vit import windowed_forward

        return windowed_forward

    def with_heads(self, attention: str) -> tuple[Slice, ...]:
        return (Slice(f"{attention}.relative_position_bias.relative_position_bias_table", "in"),)


# What the last part of a module's name says about it.
_REASONS = {
    "embeddings": "makes the width that every layer reads and writes",
    "downsample": "joins neighbouring patches into the next stage's width",
    "pooler": "outside of the layers: pools the model's width",
    "classifier": "its inputs are the width of the whole model, its outputs the classes",
    "cls_classifier": "its inputs are the width of the whole model, its outputs the classes",
    "distillation_classifier": "its inputs are the width of the whole model, its outputs the classes",
    "visual_projection": "projects into the space that images and texts share",
    "text_projection": "projects into the space that images and texts share",
}


def _reason(name: str, module: nn.Module) -> str | None:
    if not any(True for _ in module.parameters()):
        return None
    return _REASONS.get(name.rpartition(".")[2])
