"""Decoders with their key/value cache: what a recipe with `export.cache` leaves beside every member's plain ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import UsageError
from deploy_prune.pipeline.setup import Setup, tokenizer_of

if TYPE_CHECKING:
    from torch import nn

    from deploy_prune.recipe import Recipe
    from deploy_prune.release.manifest import DecoderEntry

# What a model's stage leaves for the bundle.
DECODER, SAMPLES = "decoder", "decoder.safetensors"


def check_cache(recipe: Recipe) -> None:
    """Raise UsageError when the recipe asks for a cache of a model that has none: before anything is loaded."""
    if recipe.export.cache and recipe.task.name != "causal-lm":
        raise UsageError(
            "only decoders have a key/value cache",
            where="recipe key export.cache",
            expected="export.cache: false for " + recipe.task.name,
            got="true",
        )


def make_decoder(setup: Setup, model: nn.Module, name: str, directory: Path) -> dict[str, Any] | None:
    """Export `model` with its cache into `directory` and prove it in prefill and in steps; None unless asked for.

    Raises ParityError when the file differs from the model.
    """
    from converters.decoder_export import GRAPH, export_decoder
    from converters.decoder_parity import check_decoder, record_decoder_samples
    from converters.generation import OnnxDecoder
    from deploy_prune.pipeline.making import parity_options

    if not setup.recipe.export.cache:
        return None
    form: Any = setup.recipe.export.variant  # settled before anything is exported
    report = export_decoder(
        model,
        directory / DECODER,
        tokenizer=tokenizer_of(setup),
        opset=setup.recipe.export.opset,
        variant=form,
        last_logits=setup.recipe.export.last_logits,
        metadata={"deploy_prune.member": name},
    )
    parity = check_decoder(model, directory / DECODER / GRAPH, **parity_options(setup))
    decoder = OnnxDecoder(directory / DECODER / GRAPH)
    record_decoder_samples(directory / SAMPLES, model, decoder, seed=setup.recipe.seed)
    return {**report.to_json(), "parity": parity.to_json()}


def place_decoder(
    bundle: Path, name: str, directory: Path, facts: dict[str, Any] | None, tolerance: float
) -> DecoderEntry | None:
    """Put what `make_decoder` left in `directory` into the bundle; returns the manifest's entry."""
    from converters.decoder_export import GENAI, GRAPH
    from deploy_prune.release.bundle import place
    from deploy_prune.release.manifest import DecoderEntry, SamplesEntry

    if facts is None:
        return None
    home = place(bundle, f"decoders/{name}", directory / DECODER, link=True)
    samples = place(bundle, f"samples/{name}.decoder.safetensors", directory / SAMPLES, link=True)
    exported, refused = facts["export"], facts["genai_refused"]
    return DecoderEntry.model_validate(
        {
            "directory": home,
            "file": f"{home}/{GRAPH}",
            "external": f"{home}/{exported['external']}" if exported["external"] else None,
            "sha256": exported["sha256"],
            "bytes": exported["bytes"],
            "opset": exported["opset"],
            "variant": exported["variant"],
            "caches": facts["caches"],
            "inputs": exported["inputs"],
            "outputs": facts["outputs"],
            "parity": facts["parity"],
            "samples": SamplesEntry(file=samples, tolerance=tolerance),
            "genai": None if refused else f"{home}/{GENAI}",
            "genai_refused": refused,
        }
    )
