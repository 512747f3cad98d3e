"""Models of the suite: real shapes with random weights, made from their configuration alone; nothing is fetched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploy_prune.signature import Signature, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deploy_prune.path import SolutionPath
    from deploy_prune.plan import PrunePlan
    from deploy_prune.units import Site


@dataclass(frozen=True)
class Subject:
    """A model to check, how it is called, and the (batch, sequence) cells it is timed in."""

    name: str
    build: Callable[[], nn.Module]
    signature: Signature
    cells: tuple[tuple[int, int | None], ...]

    @property
    def mask(self) -> str | None:
        """The input that says which tokens count; where outputs are per token."""
        return "attention_mask" if "sequence" in self.signature.output.shape else None


@dataclass(frozen=True)
class Member:
    """A model and the sites it had before the cut; `plan` None is the dense model."""

    model: nn.Module
    sites: tuple[Site, ...]
    path: SolutionPath
    plan: PrunePlan


def subjects(small: bool) -> list[Subject]:
    """ViT-B/16, BERT-base and SmolLM2-135M; `small`: two narrow layers of each."""
    return [_vit(small), _bert(small), _llama(small)]


def half_of(model: nn.Module, signature: Signature, align: int, seed: int = 0) -> Member:
    """The model with half its MACs, whole heads and neurons in aligned numbers gone from every layer alike along a
    random path: what is kept does not matter to time."""
    import numpy as np

    from converters.surgery import compact
    from deploy_prune.adapters import find_sites
    from deploy_prune.architecture import weights_sha256
    from deploy_prune.budget import CostModel
    from deploy_prune.path import SolutionPath
    from deploy_prune.units import groups, unit_key

    sites = tuple(find_sites(model))
    costs = CostModel.measure(model, sites, signature, signature.random_inputs({"batch": 1, "sequence": 16}, seed=seed))
    generator = np.random.default_rng(seed)
    path = SolutionPath.from_importance(
        {unit_key(s.name, kind): generator.uniform(0.1, 1.0, s.units(kind)) for s, kind in groups(sites)},
        allocation="uniform",
        model="random weights",
        weights_sha256=weights_sha256(model),
        sites=sites,
        costs=costs,
        method="random",
    )
    plan = path.plan(budget="macs", value=0.5, align=align, kinds=path.kinds(["head", "neuron"]))
    return Member(compact(model, plan, check_weights=False), sites, path, plan)


def _vit(small: bool) -> Subject:
    size, patch, width, depth, heads = (32, 8, 48, 2, 3) if small else (224, 16, 768, 12, 12)

    def build() -> nn.Module:
        from deploy_prune.architecture import Architecture

        shape = {"img_size": size, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
        return _seeded(Architecture("timm", "vit_base_patch16_224", {**shape, "num_classes": 1000}).build)

    signature = Signature(
        (TensorSpec("pixel_values", "float32", ("batch", 3, size, size)),),
        TensorSpec("logits", "float32", ("batch", 1000)),
        lambda model, inputs: model(inputs["pixel_values"]),
    )
    cells = ((1, None), (2, None)) if small else ((1, None), (8, None), (256, None))
    return Subject("vit-b", build, signature, cells)


def _bert(small: bool) -> Subject:
    def build() -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        config = BertConfig(**({**tiny, "vocab_size": 99} if small else {}), attn_implementation="sdpa")
        return _seeded(lambda: BertForSequenceClassification(config))

    signature = _text(99 if small else 30522, ("batch", 2), {})
    cells = ((1, 8), (2, 16)) if small else ((1, 128), (8, 128), (256, 128), (8, 512))
    return Subject("bert-base", build, signature, cells)


def _llama(small: bool) -> Subject:
    vocabulary = 99 if small else 49152

    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        shape: dict[str, Any] = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9}
        shape |= {"num_key_value_heads": 3, "intermediate_size": 1536, "max_position_embeddings": 8192}
        if small:
            shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
            shape |= {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
        config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, attn_implementation="sdpa", **shape)
        return _seeded(lambda: LlamaForCausalLM(config))

    signature = _text(vocabulary, ("batch", "sequence", vocabulary), {"use_cache": False})
    cells = ((1, 8), (2, 16)) if small else ((1, 128), (1, 2048), (8, 512))
    return Subject("smollm2-135m", build, signature, cells)


def _text(vocabulary: int, output: tuple[int | str, ...], more: Mapping[str, Any]) -> Signature:
    def call(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = model(**inputs, **more).logits
        return logits

    return Signature(
        (
            TensorSpec("input_ids", "int64", ("batch", "sequence"), "ids", high=vocabulary),
            TensorSpec("attention_mask", "int64", ("batch", "sequence"), "mask"),
        ),
        TensorSpec("logits", "float32", output),
        call,
    )


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()
