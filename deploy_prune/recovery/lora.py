"""Low-rank adapters (arXiv 2106.09685): trained beside frozen weights, then merged, so that nothing of them ships."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn


def places(model: nn.Module, layers: Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers inside the named modules, by name: those that get an adapter."""
    from transformers.pytorch_utils import Conv1D

    linear = {name: module for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)}
    return {name: m for name, m in linear.items() if any(f"{name}.".startswith(f"{layer}.") for layer in layers)}


def add_adapters(model: nn.Module, layers: Sequence[str], rank: int, alpha: float) -> None:
    """Freeze `model` and put an adapter, in place, beside every linear layer inside the named modules."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    linear = places(model, layers)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules="|".join(map(re.escape, linear)),
        fan_in_fan_out=any(type(layer) is Conv1D for layer in linear.values()),  # GPT-2 stores (in, out)
    )
    model.requires_grad_(False)
    inject_adapter_in_model(config, model)


def merge_adapters(model: nn.Module) -> None:
    """Add every adapter to the weights it stands beside, and take it out, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
