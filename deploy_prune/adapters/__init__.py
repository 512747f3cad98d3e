"""The registry of architecture families. To add one: a file beside this and a line in ADAPTERS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploy_prune.adapters.base import Adapter
from deploy_prune.adapters.hf_albert import HfAlbert
from deploy_prune.adapters.hf_bert import HfBert
from deploy_prune.adapters.hf_distilbert import HfDistilBert
from deploy_prune.adapters.hf_gpt2 import HfGpt2
from deploy_prune.adapters.hf_llama import HfLlama
from deploy_prune.adapters.hf_opt import HfOpt
from deploy_prune.adapters.hf_swinv2 import HfSwinv2
from deploy_prune.adapters.hf_vit import HfClip, HfDinov2, HfSwin, HfViT
from deploy_prune.adapters.timm_swin import TimmSwin
from deploy_prune.adapters.timm_vit import TimmViT
from deploy_prune.errors import UnsupportedModelError
from deploy_prune.units import Site

if TYPE_CHECKING:
    from torch import nn

ADAPTERS: tuple[Adapter, ...] = (
    TimmViT(),
    TimmSwin(),
    HfViT(),
    HfDinov2(),
    HfClip(),
    HfSwin(),
    HfSwinv2(),
    HfBert(),
    HfAlbert(),
    HfDistilBert(),
    HfLlama(),
    HfOpt(),
    HfGpt2(),
)
# Families that look like a supported one and are not.
_ALIBI = "its attention adds position biases by head number (ALiBi), which no adapter cuts"
REFUSED = {"bloom": _ALIBI, "mpt": _ALIBI}
_LOOKS_LIKE_A_SITE = ("attention", "mlp", "feedforward", "ffn")


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of the model's family. Raises UnsupportedModelError naming the sublayers nobody understands."""
    for adapter in ADAPTERS:
        if adapter.matches(model):
            return adapter
    sublayers = [
        f"{name}: {type(module).__name__}"
        for name, module in model.named_modules()
        if name and any(word in type(module).__name__.lower() for word in _LOOKS_LIKE_A_SITE)
    ]
    why = REFUSED.get(getattr(getattr(model, "config", None), "model_type", ""))
    raise UnsupportedModelError(
        f"no adapter understands {type(model).__name__}" + (f": {why}" if why else ""),
        expected="one of the families " + ", ".join(a.name for a in ADAPTERS),
        got=f"{type(model).__module__}.{type(model).__name__}",
        problems=sublayers or ["no sublayer looks like attention or feed-forward"],
        remedy="Write an adapter (CONTRIBUTING.md, 'To add an architecture'): one file and one registry line.",
    )


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every prunable site of `model`, in model order. Raises UnsupportedModelError."""
    return adapter_for(model).sites(model)
