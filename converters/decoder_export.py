"""A decoder as a directory to be served from: one ONNX graph for prefill and decoding, the tokenizer, and the settings
of onnxruntime-genai.

DIR/model.onnx (+ model.onnx.data)   input_ids, attention_mask, past_key_values.N.* -> logits, present.N.*
DIR/tokenizer.json, ...              where a tokenizer is given
DIR/genai_config.json                where onnxruntime-genai can serve the model
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.cache import CacheSlot, cache_slots, decoding_signature
from converters.generation import METADATA, About
from converters.onnx_export import ExportReport, export_onnx
from deploy_prune.errors import UnsupportedModelError
from deploy_prune.files import atomic_dir, write_json
from deploy_prune.tasks.tokens import longest_text

if TYPE_CHECKING:
    from torch import nn

    from converters.variants import Variant
    from deploy_prune.signature import Signature

GRAPH, GENAI = "model.onnx", "genai_config.json"
TRACED = {"past_sequence": 5, "total_sequence": 16}  # beside the exporter's own 11 new tokens


@dataclass(frozen=True)
class DecoderReport:
    """What was written. `genai_refused` says why there is no genai_config.json, None where there is one."""

    export: ExportReport
    caches: tuple[CacheSlot, ...]
    outputs: list[dict[str, Any]]
    genai_refused: str | None

    def to_json(self) -> dict[str, Any]:
        return {
            "export": self.export.to_json(),
            "caches": [asdict(slot) for slot in self.caches],
            "outputs": self.outputs,
            "genai_refused": self.genai_refused,
        }


def export_decoder(
    model: nn.Module,
    directory: Path | str,
    *,
    tokenizer: Any = None,
    opset: int = 18,
    variant: Variant = "plain",
    last_logits: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> DecoderReport:
    """Write a causal language model of transformers with its key/value cache into `directory`, atomically.

    One graph serves prefill (an empty past) and decoding. Caches are those of `cache_slots`: of unlike heads and
    widths, and none where an attention vanished. `tokenizer` is saved beside it; `variant` is the form of the graph.
    With `last_logits` it computes logits (batch, 1, vocabulary) of the last new token alone, which is all that
    generation asks of a prompt.
    Raises as `export_onnx`, and UnsupportedModelError for a model without a cache.
    """
    from converters.genai import genai_config

    slots = cache_slots(model)
    with atomic_dir(directory) as room:
        report, about, signature = export_decoder_graph(
            model, room / GRAPH, opset=opset, variant=variant, last_logits=last_logits, metadata=metadata
        )
        refused = None
        try:
            write_json(room / GENAI, genai_config(model, slots, about))
        except UnsupportedModelError as error:
            refused = error.what
        if tokenizer is not None:
            tokenizer.save_pretrained(room)
    outputs = [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in signature.outputs]
    return DecoderReport(report, slots, outputs, refused)


def export_decoder_graph(
    model: nn.Module,
    file: Path,
    *,
    opset: int = 18,
    variant: Variant = "plain",
    last_logits: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> tuple[ExportReport, About, Signature]:
    """The ONNX file of `export_decoder` alone, with what it says of the model and its signature. Raises as that."""
    signature = decoding_signature(model, last_logits=last_logits)
    about = About(stop_tokens(model), longest_text(getattr(model, "config", None)))
    report = export_onnx(
        model,
        file,
        signature,
        opset=opset,
        variant=variant,
        example_sizes=TRACED,
        metadata={**(metadata or {}), METADATA: about.to_json()},
    )
    return report, about, signature


def stop_tokens(model: nn.Module) -> tuple[int, ...]:
    """The tokens that end a text, by the model's generation config or its own."""
    found = None
    for config in (getattr(model, "generation_config", None), model.config):
        found = getattr(config, "eos_token_id", None) if found is None else found
    return () if found is None else tuple(found) if isinstance(found, list | tuple) else (int(found),)
