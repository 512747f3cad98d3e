"""A compact model of equal layers as an ordinary checkpoint: transformers' `from_pretrained` and timm's `create_model`
load it without this package.

A stock class computes its layers' widths from a few numbers. Which unit kinds those numbers can say is a fact of each
family; all others are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import PlanError, UnsupportedModelError, UsageError
from deploy_prune.files import atomic_dir
from deploy_prune.units import Site, UnitKind

if TYPE_CHECKING:
    from torch import nn

Keys = Mapping[UnitKind, tuple[str, ...]]
_TIED = "the stock class makes a head as wide as hidden size / number of heads"
_ROTARY = "the stock class turns all dimensions of a head by rotary embedding, in fixed pairs"
_ONE_WIDTH = "the stock class has one width for queries, keys and values"
_LLAMA: Keys = {
    UnitKind.NEURON: ("intermediate_size",),
    UnitKind.HEAD: ("num_attention_heads", "num_key_value_heads"),
}
_VIT: Keys = {UnitKind.NEURON: ("intermediate_size",), UnitKind.HEAD: ("num_attention_heads",)}
_NEURONS: Keys = {UnitKind.NEURON: ("intermediate_size",)}
# By model type: which config keys say how many units of a kind there are, and why others cannot be said.
FAMILIES: dict[str, tuple[Keys, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), (_LLAMA, _ROTARY)),
    **dict.fromkeys(("vit", "deit"), (_VIT, _ONE_WIDTH)),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "albert"), (_NEURONS, _TIED)),
    "distilbert": ({UnitKind.NEURON: ("hidden_dim",)}, _TIED),
    "opt": ({UnitKind.NEURON: ("ffn_dim",)}, _TIED),
    "gpt2": ({UnitKind.NEURON: ("n_inner",)}, _TIED),
}
TIMM_VIT: Keys = {UnitKind.NEURON: ("mlp_ratio",)}


def stock_kinds(model: nn.Module, wanted: tuple[UnitKind, ...] | None = None) -> tuple[UnitKind, ...]:
    """The unit kinds that a uniform plan of `model` may cut: all there are, or the `wanted` ones.

    Raises UnsupportedModelError for a family without any, UsageError for a wanted kind that is none, saying why.
    """
    keys, why = _family(model)
    if wanted is None:
        return tuple(keys)
    if problems := [f"{kind.value}: {why}" for kind in wanted if kind not in keys]:
        raise UsageError(
            "units of these kinds cannot leave in the uniform layout",
            where=type(model).__name__,
            problems=problems,
            expected=f"kinds {', '.join(kind.value for kind in keys)}",
            remedy="Leave family.kinds out, or take the free layout (family.layout: free).",
        )
    return wanted


def stock_model(small: nn.Module) -> nn.Module:
    """A model of the library's own classes with the weights of the compact model `small`, bit for bit.

    Raises PlanError when layers of `small` differ in size, UnsupportedModelError when no stock class has its shape.
    """
    import torch

    from deploy_prune.adapters import find_sites
    from deploy_prune.architecture import Architecture

    keys, why = _family(small)
    sites = find_sites(small)
    found = _common(sites, keys)
    with torch.random.fork_rng():
        if hasattr(small, "config"):
            config: Any = copy.deepcopy(small.config)
            if UnitKind.HEAD in keys:  # else the class would divide by the new number of heads
                config.head_dim = sites[0].qk_width
            for kind, value in found.items():
                for key in keys[kind]:
                    setattr(config, key, value * _queries(sites) if key == "num_attention_heads" else value)
            stock: nn.Module = type(small)(config)  # type: ignore[call-arg]
            if (generation := getattr(small, "generation_config", None)) is not None:
                stock.generation_config = copy.deepcopy(generation)
        else:
            own = Architecture.of(small)
            stock = Architecture("timm", own.name, {**own.arguments, **_timm_arguments(small, found)}).build()
    state = small.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in stock.state_dict().items()}
    have = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if odd := sorted(name for name in wanted.keys() | have.keys() if wanted.get(name) != have.get(name)):
        raise UnsupportedModelError(
            "no stock class has the shape of this model",
            where=type(small).__name__,
            problems=[f"{n}: {have.get(n, 'none')}, the stock class has {wanted.get(n, 'none')}" for n in odd[:20]],
            remedy=f"Cut in the uniform layout; of the other kinds, {why}.",
        )
    stock.load_state_dict(state)
    return stock.eval()


def save_stock(small: nn.Module, directory: Path | str, *, tokenizer: Any = None) -> Path:
    """Write the compact model `small` as an ordinary checkpoint, atomically; returns the directory.

    `transformers.CLASS.from_pretrained(DIR)`, or `timm.create_model("local-dir:DIR", pretrained=True)`, loads it.
    Raises as `stock_model`.
    """
    stock: Any = stock_model(small)
    directory = Path(directory)
    with atomic_dir(directory) as room:
        if hasattr(stock, "config"):
            stock.save_pretrained(room)
        else:
            from timm.models import save_for_hf

            from deploy_prune.architecture import Architecture

            save_for_hf(stock, room, model_args=Architecture.of(stock).arguments, safe_serialization=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(room)
    return directory


def _family(model: nn.Module) -> tuple[Keys, str]:
    from deploy_prune.adapters import adapter_for
    from deploy_prune.sharing import CONFIG_KEY

    name = adapter_for(model).name
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", name)
    reason = None
    if name == "timm-vit":
        reason = _timm_reason(model)
        if reason is None:
            return TIMM_VIT, _TIED
    elif getattr(config, CONFIG_KEY, None):
        reason = "its blocks are shared by depths, which no stock class knows"
    elif kind not in FAMILIES:
        reason = "its layers are of unlike widths, or its config does not name them"
    if reason is not None:
        raise UnsupportedModelError(
            f"models of type {kind} have no uniform layout: {reason}",
            where=type(model).__name__,
            expected=f"one of {', '.join(FAMILIES)}, or timm's VisionTransformer",
            remedy="Take the free layout; `dp.load_pruned` and the ONNX files serve it.",
        )
    return FAMILIES[kind]


def _timm_reason(model: Any) -> str | None:
    """Why timm's constructor cannot give a VisionTransformer other neurons in its blocks."""
    from timm.layers import Mlp

    from deploy_prune.architecture import Architecture

    if (own := Architecture.of(model)).library != "timm":
        return f"{own.name} builds this one, whose arguments are not timm's"
    if getattr(model, "attn_pool", None) is not None:
        return "the pooling attention has as many neurons as every block"
    if any(type(block.mlp) is not Mlp for block in model.blocks):
        return "the neurons of a gated feed-forward are rounded by its constructor"
    return None


def _common(sites: tuple[Site, ...], keys: Keys) -> dict[UnitKind, int]:
    """How many units of each kind every site has. Raises PlanError where they differ."""
    found: dict[UnitKind, int] = {}
    problems = []
    for kind in keys:
        counts = {site.name: site.counts[kind] for site in sites if kind in site.counts}
        if len(set(counts.values())) > 1:
            problems += [f"{name}: {count} {kind.value}s" for name, count in counts.items()]
        if counts:
            found[kind] = next(iter(counts.values()))
    if problems:
        raise PlanError(
            "layers of unlike size have no stock class",
            problems=problems[:20],
            remedy="Cut with uniform_plan(path, ...) or family.layout: uniform.",
        )
    return found


def _queries(sites: tuple[Site, ...]) -> int:
    return next(site.query_heads_per_unit for site in sites if UnitKind.HEAD in site.counts)


def _timm_arguments(small: Any, found: Mapping[UnitKind, int]) -> dict[str, Any]:
    """timm takes the neurons as a share of the width, and cuts off what is behind the point."""
    if UnitKind.NEURON not in found:
        return {}
    neurons, width = found[UnitKind.NEURON], int(small.embed_dim)
    ratio = neurons / width
    return {"mlp_ratio": ratio if int(width * ratio) == neurons else (neurons + 0.5) / width}
