"""Low-rank adapters cut along with their model, so that a compact base and its adapters can ship apart.

An adapter adds B A x to a layer's output. Where the layer loses inputs, A (rank, in) loses those columns; where it
loses outputs, B (out, rank) loses those rows. What is left is an ordinary peft checkpoint for the compact base.

DIR/base/      the compact model without adapters, as converters.checkpoint writes it
DIR/adapter/   adapter_config.json and adapter_model.safetensors, as peft writes them
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from deploy_prune.plan import PrunePlan

BASE, ADAPTER = "base", "adapter"


def split_adapters(adapted: nn.Module, plan: PrunePlan) -> tuple[nn.Module, Any]:
    """(compact base, PeftModel on a copy of it) of a dense-shaped model with one LoRA adapter beside its layers.

    `adapted` is a model in which peft injected adapters, or a PeftModel; it is not changed. Adapters of layers that
    vanish with their site go too. Raises UsageError for adapters of another kind (DoRA, trained biases, merged ones,
    several, modules saved whole), listing each; UnavailableError without peft; PlanError.
    """
    import torch

    from converters.surgery import compact
    from deploy_prune.adapters import find_sites
    from deploy_prune.layers import is_cuttable

    peft = _peft()
    inner = adapted.get_base_model() if isinstance(adapted, peft.PeftModel) else adapted
    adapters = _lora_layers(inner)
    dense = _without_adapters(inner)
    sites = find_sites(dense)
    base = compact(dense, plan, check_weights=False)
    left = {name for name, module in base.named_modules() if is_cuttable(module) and name in adapters}
    if not left:
        raise UsageError("no layer with an adapter is left", where=plan.model, got=f"{len(adapters)} before the cut")
    wrapped = peft.get_peft_model(copy.deepcopy(base), _config({name: adapters[name] for name in sorted(left)}))
    wrapped.peft_config["default"].base_model_name_or_path = plan.model
    small = dict(wrapped.get_base_model().named_modules())
    kept = {site.name: {kind: plan.kept(site, kind) for kind in site.counts} for site in sites}
    with torch.no_grad():
        for name in left:
            own, (A, B) = small[name], _matrices(adapters[name])
            for site in sites:
                for layer, axis in site.axes():
                    if layer != name:
                        continue
                    width = A.shape[1] if axis == "in" else B.shape[0]
                    stays = torch.from_numpy(site.kept_features(name, axis, width, kept[site.name])).to(A.device)
                    A, B = (A[:, stays], B) if axis == "in" else (A, B[stays])
            own.lora_A["default"].weight.copy_(A)
            own.lora_B["default"].weight.copy_(B)
    return base, wrapped.eval()


def save_apart(adapted: nn.Module, plan: PrunePlan, directory: Path | str, *, tokenizer: Any = None) -> Path:
    """Write the compact base and the cut adapters of `split_adapters`, atomically; returns the directory."""
    from converters.checkpoint import save_pruned
    from deploy_prune.files import atomic_dir

    base, wrapped = split_adapters(adapted, plan)
    directory = Path(directory)
    with atomic_dir(directory) as room:
        save_pruned(base, plan, room / BASE, tokenizer=tokenizer)
        wrapped.save_pretrained(room / ADAPTER)
    return directory


def load_apart(directory: Path | str, *, trust_code: bool = False) -> nn.Module:
    """The compact base with its adapters beside it, a PeftModel in eval mode; `merge_and_unload()` joins them.

    Raises what `load_pruned` raises, UnavailableError without peft.
    """
    from converters.checkpoint import load_pruned
    from deploy_prune.files import existing

    directory = existing(directory, "directory of base and adapter")
    base = load_pruned(directory / BASE, trust_code=trust_code)
    loaded: nn.Module = _peft().PeftModel.from_pretrained(base, str(existing(directory / ADAPTER, "adapter")))
    return loaded.eval()


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UnavailableError("adapters need the package peft", remedy="pip install 'deploy-prune[lora]'") from None
    return peft


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> layer with an adapter. Raises UsageError for what cannot be cut along, all of it listed."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    found, problems = {}, []
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            problems.append(f"{name}: a module saved whole (modules_to_save)")
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, LoraLayer):
            problems.append(f"{name}: a {type(module).__name__}, expected LoRA")
            continue
        found[name] = module
        if len(module.lora_A) != 1:
            problems.append(f"{name}: {len(module.lora_A)} adapters, expected one")
        if module.merged:
            problems.append(f"{name}: merged into its weight")
        if any(module.use_dora.values()):
            problems.append(f"{name}: DoRA, whose magnitudes belong to the uncut layer")
        if any(module.lora_bias.values()):
            problems.append(f"{name}: an adapter with a bias")
    if not found and not problems:
        problems.append("no layer has an adapter")
    if problems:
        raise UsageError("these adapters cannot be cut along", problems=problems[:20])
    return found


def _without_adapters(model: nn.Module) -> nn.Module:
    """A copy whose adapted layers are the plain ones, nothing merged."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain = copy.deepcopy(model)
    for name, module in [(n, m) for n, m in plain.named_modules() if isinstance(m, BaseTunerLayer)]:
        plain.set_submodule(name, module.get_base_layer())
    return plain


def _matrices(layer: Any) -> tuple[Any, Any]:
    (name,) = layer.lora_A
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _config(layers: dict[str, Any]) -> Any:
    """A LoRA config under which peft makes these very adapters anew. What is not in it does not change what they add:
    dropout is for training, and the scale is given by rank and alpha."""
    ranks, alphas = {}, {}
    for name, layer in layers.items():
        (own,) = layer.lora_A
        ranks[name] = layer.r[own]
        alphas[name] = layer.scaling[own] * layer.r[own]  # as plain LoRA scales, alpha / r, whatever rule set it
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return _peft().LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        alpha_pattern={f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        lora_dropout=0.0,
        bias="none",
        target_modules="|".join(map(re.escape, layers)),
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers.values()),
    )
