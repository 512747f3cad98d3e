"""The settings with which onnxruntime-genai serves an exported decoder.

Tried with onnxruntime-genai 0.18: it reads heads and width of every layer's cache off the graph, so layers may differ;
within a layer it makes the values as wide as the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from converters.cache import CacheSlot
from converters.generation import About
from deploy_prune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # model types it knows by their own names
ANY = "decoder"  # its type of a decoder that it knows nothing more of


def genai_config(model: nn.Module, slots: Sequence[CacheSlot], about: About) -> dict[str, Any]:
    """The content of genai_config.json, beside a graph `model.onnx` whose caches are `slots`.

    Raises UnsupportedModelError, saying why, for a model that onnxruntime-genai cannot serve.
    """
    config: Any = model.config
    if not slots:
        raise UnsupportedModelError("onnxruntime-genai needs a key/value cache, and every attention of it vanished")
    if not about.stop or about.longest is None:
        raise UnsupportedModelError(
            "onnxruntime-genai needs an end-of-text token and a longest text; the model has none"
        )
    if odd := [slot for slot in slots if slot.key_width != slot.value_width]:
        raise UnsupportedModelError(
            "onnxruntime-genai takes one width for the keys and values of a layer; those at depth "
            + ", ".join(f"{s.depth} are {s.key_width} and {s.value_width}" for s in odd[:3])
            + (f", and {len(odd) - 3} more" if len(odd) > 3 else "")
            + " (cut kinds head and neuron only)"
        )
    first = slots[0]
    pad = getattr(config, "pad_token_id", None)
    bos = getattr(config, "bos_token_id", None)
    return {
        "model": {
            "type": config.model_type if config.model_type in FAMILIES else ANY,
            "vocab_size": config.vocab_size,
            "context_length": about.longest,
            "bos_token_id": about.stop[0] if bos is None else bos,
            "eos_token_id": list(about.stop),
            "pad_token_id": about.stop[0] if pad is None else pad,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": len(slots),
                "num_key_value_heads": first.heads,
                "head_size": first.key_width,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": about.longest,
            "past_present_share_buffer": False,
        },
    }
