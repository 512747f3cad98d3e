"""Helpers of several test files: signatures of the tiny models, random paths, and the forms of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deploy_prune.adapters import find_sites
from deploy_prune.architecture import weights_sha256
from deploy_prune.budget import CostModel
from deploy_prune.path import SolutionPath
from deploy_prune.signature import Signature, TensorSpec
from deploy_prune.units import groups, unit_key

SIZES = {"batch": 2, "sequence": 11}


def image_signature(size: int = 32, classes: int = 5) -> Signature:
    return Signature(
        (TensorSpec("pixel_values", "float32", ("batch", 3, size, size)),),
        TensorSpec("logits", "float32", ("batch", classes)),
        lambda model, inputs: _logits(model(inputs["pixel_values"])),
    )


def pair_signature(size: int = 32, width: int = 24, vocabulary: int = 99) -> Signature:
    """Image and text in, the two embeddings of every pair out."""

    def call(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        found = model(**inputs)
        return torch.stack([found.image_embeds, found.text_embeds], 1)

    text = text_signature(("batch",), vocabulary).inputs
    image = TensorSpec("pixel_values", "float32", ("batch", 3, size, size))
    return Signature((*text, image), TensorSpec("embeddings", "float32", ("batch", 2, width)), call)


def _logits(found: Any) -> Tensor:
    """timm's models give logits, those of transformers an object that holds them."""
    return getattr(found, "logits", found)


def text_signature(output: tuple[int | str, ...], vocabulary: int = 99) -> Signature:
    def call(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits

    return Signature(
        (
            TensorSpec("input_ids", "int64", ("batch", "sequence"), "ids", high=vocabulary),
            TensorSpec("attention_mask", "int64", ("batch", "sequence"), "mask"),
        ),
        TensorSpec("logits", "float32", output),
        call,
    )


def decoder_signature(vocabulary: int = 99) -> Signature:
    """As the causal-lm task has it; what lies on padding means nothing and is not compared."""

    def call(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return model(**inputs, use_cache=False).logits

    return replace(text_signature(("batch", "sequence", vocabulary), vocabulary), call=call)


@dataclass(frozen=True)
class Family:
    """A row of the support table: a tiny model (the fixture of its key) that passes every check of an adapter.

    `library` is timm or transformers, `covers` what a user of it would call these models.
    """

    library: str
    covers: str
    signature: Signature


# Fixture -> family. A new architecture is one line here and one fixture; README's table is made of these.
FAMILIES: dict[str, Family] = {
    "tiny_vit": Family("timm", "ViT, DeiT", image_signature()),
    "tiny_deit_distilled": Family("timm", "DeiT, distilled", image_signature()),
    "tiny_deit3": Family("timm", "DeiT-III", image_signature()),
    "tiny_timm_dinov2": Family("timm", "DINOv2 with registers and SwiGLU", image_signature()),
    "tiny_vit_qk_norm": Family("timm", "ViT with qk norm and attention pooling", image_signature()),
    "tiny_vit_clip": Family("timm", "CLIP's image tower", image_signature()),
    "tiny_swin": Family("timm", "Swin", image_signature()),
    "tiny_swinv2": Family("timm", "Swin v2", image_signature()),
    "tiny_hf_vit": Family("transformers", "ViT", image_signature()),
    "tiny_hf_deit": Family("transformers", "DeiT, distilled too", image_signature()),
    "tiny_hf_dinov2": Family("transformers", "DINOv2", image_signature()),
    "tiny_hf_dinov2_registers": Family("transformers", "DINOv2 with registers and SwiGLU", image_signature()),
    "tiny_hf_swin": Family("transformers", "Swin", image_signature()),
    "tiny_hf_swinv2": Family("transformers", "Swin v2", image_signature()),
    "tiny_clip": Family("transformers", "CLIP, both towers", pair_signature()),
    "tiny_bert": Family("transformers", "BERT", text_signature(("batch", 3))),
    "tiny_distilbert": Family("transformers", "DistilBERT", text_signature(("batch", 2))),
    "tiny_roberta": Family("transformers", "RoBERTa, XLM-RoBERTa, CamemBERT", text_signature(("batch", 3))),
    "tiny_electra": Family("transformers", "ELECTRA", text_signature(("batch", 3))),
    "tiny_albert": Family("transformers", "ALBERT (layers shared by depths)", text_signature(("batch", 3))),
    "tiny_llama": Family("transformers", "Llama, SmolLM, SmolLM2", decoder_signature()),
    "tiny_mobilellm": Family("transformers", "MobileLLM's shape, blocks shared by depths", decoder_signature()),
    "tiny_mistral": Family("transformers", "Mistral", decoder_signature()),
    "tiny_qwen2": Family("transformers", "Qwen2, Qwen2.5", decoder_signature()),
    "tiny_qwen3": Family("transformers", "Qwen3 (dense)", decoder_signature()),
    "tiny_smollm3": Family("transformers", "SmolLM3", decoder_signature()),
    "tiny_opt": Family("transformers", "OPT", decoder_signature()),
    "tiny_opt_350m": Family("transformers", "OPT with norms after", decoder_signature()),
    "tiny_gpt2": Family("transformers", "GPT-2, DistilGPT2", decoder_signature()),
}
# Enough for rules of paths, searches and refits, which know sites and no adapter.
FEW = ("tiny_vit", "tiny_bert", "tiny_distilbert", "tiny_llama")


def signature_of(family: str) -> Signature:
    """The signature of one of the tiny fixtures."""
    return FAMILIES[family].signature


def random_path(model: nn.Module, signature: Signature, seed: int = 0, **more: Any) -> SolutionPath:
    """A path with random importance, for properties that hold whatever the search."""
    sites = find_sites(model)
    inputs = signature.random_inputs({**SIZES, "batch": 1}, seed=seed)
    generator = np.random.default_rng(seed)
    costs = CostModel.measure(model, sites, signature, inputs)
    importance = {
        unit_key(s.name, k): generator.random(s.units(k)) * costs.unit_params(s, k) / s.lanes(k)
        for s, k in groups(sites)
    }
    return SolutionPath.from_importance(
        importance,
        model="tiny",
        weights_sha256=weights_sha256(model),
        sites=sites,
        costs=costs,
        method="random",
        **more,
    )


def output(model: nn.Module, signature: Signature, *, seed: int = 3, padding: bool = True) -> Tensor:
    """The model's output on made-up inputs, without gradients."""
    with torch.no_grad():
        return signature.call(model, signature.random_inputs(SIZES, seed=seed, padding=padding))


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())
