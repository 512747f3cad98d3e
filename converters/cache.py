"""A decoder's key/value cache as inputs and outputs: which layers have one, of which shape, and the function of a step.

One function serves prefill and decoding: with an empty past it reads a whole prompt, with the caches it gave back it
goes on, by one token or several. Positions follow from the attention mask alone, so prompts may be padded on the left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploy_prune.adapters.modules.past import NAMES
from deploy_prune.errors import UnsupportedModelError
from deploy_prune.signature import Signature, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

PAST = "past_key_values.{}.{}"  # by number of the cache, "key" or "value"; the names onnxruntime-genai knows
PRESENT = "present.{}.{}"
KEEP = "logits_to_keep"  # of how many tokens, from the end, transformers' models compute logits


def is_cache(name: str) -> bool:
    """Whether an input or output of a decoder is a cache."""
    return name.startswith((PAST.partition("{")[0], PRESENT.partition("{")[0]))


@dataclass(frozen=True)
class CacheSlot:
    """The cache of one depth: `CacheSlot(depth=3, heads=2, key_width=48, value_width=40)`.

    Key (batch, heads, tokens, key_width) and value (batch, heads, tokens, value_width) of one attention.
    """

    depth: int
    heads: int
    key_width: int
    value_width: int


def cache_slots(model: nn.Module) -> tuple[CacheSlot, ...]:
    """The caches of a decoder, by rising depth; a depth whose attention vanished has none.

    Blocks shared by depths have one per depth. Raises UnsupportedModelError for a model that keeps no cache.
    """
    return _probe(model)[0]


def decoding_signature(model: nn.Module, *, last_logits: bool = False) -> Signature:
    """ids, mask over past and new tokens, and the caches in; logits of the new tokens, or with `last_logits` of the
    last of them alone, and the longer caches out.

    Caches are numbered without gaps, in the order of `cache_slots`. Dimensions: `batch`, `sequence` (new tokens),
    `past_sequence`, `total_sequence` (their sum). Raises UnsupportedModelError for a model that cannot leave logits out
    when that is asked for.
    """
    slots, depths = _probe(model)
    if last_logits:
        check_keeps(model)
    config: Any = model.config

    def caches(pattern: str, length: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(pattern.format(number, role), "float32", ("batch", slot.heads, length, width))
            for number, slot in enumerate(slots)
            for role, width in (("key", slot.key_width), ("value", slot.value_width))
        )

    past = caches(PAST, "past_sequence")

    def call_all(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return _step(model, slots, depths, inputs, last_logits)

    return Signature(
        inputs=(
            TensorSpec("input_ids", "int64", ("batch", "sequence"), "ids", high=config.vocab_size),
            TensorSpec("attention_mask", "int64", ("batch", "total_sequence"), "mask"),
            *past,
        ),
        output=TensorSpec("logits", "float32", ("batch", 1 if last_logits else "sequence", config.vocab_size)),
        call=lambda model, inputs: call_all(model, inputs)[0],
        state=caches(PRESENT, "total_sequence"),
        call_all=call_all,
    )


def positions(attention_mask: Tensor, new: int) -> Tensor:
    """Positions of the last `new` tokens, counting only what the mask (batch, total) lets through; padding has 0."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, attention_mask.shape[1] - new :]


def _step(
    model: nn.Module, slots: tuple[CacheSlot, ...], depths: int, inputs: Mapping[str, Tensor], last_logits: bool
) -> tuple[Tensor, ...]:
    """Logits, then key and value of every slot."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    past = {
        slot.depth: (inputs[PAST.format(number, "key")], inputs[PAST.format(number, "value")])
        for number, slot in enumerate(slots)
    }
    nothing = ids.new_zeros((ids.shape[0], 1, mask.shape[1] - ids.shape[1], 1)).to(next(model.parameters()).dtype)
    cache = _filled([past.get(depth, (nothing, nothing)) for depth in range(depths)])
    output: Any = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions(mask, ids.shape[1]),
        use_cache=True,
        **{_cache_argument(model): cache},
        **({KEEP: 1} if last_logits else {}),
    )
    longer = [tensor for slot in slots for tensor in (cache.layers[slot.depth].keys, cache.layers[slot.depth].values)]
    return (output.logits, *longer)


def _filled(layers: list[tuple[Tensor, Tensor]]) -> Any:
    """A cache of transformers that holds these keys and values and drops none, also behind a sliding window."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for key, value in layers:
        layer = DynamicLayer()
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value
        cache.layers.append(layer)
    return cache


def _probe(model: nn.Module) -> tuple[tuple[CacheSlot, ...], int]:
    """(slots, number of depths), seen while the model reads two tokens."""
    import torch
    from transformers import DynamicCache

    from deploy_prune.adapters.modules.vanished import Absent

    gone: set[int] = set()

    def note(module: nn.Module, *_: Any) -> None:
        if module.layer_idx is not None:
            gone.add(int(module.layer_idx))  # type: ignore[arg-type]

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, Absent)]
    cache = DynamicCache()
    try:
        with torch.no_grad():
            ids = torch.zeros((1, 2), dtype=torch.int64, device=next(model.parameters()).device)
            model(input_ids=ids, use_cache=True, **{_cache_argument(model): cache})
    finally:
        for handle in handles:
            handle.remove()
    slots = tuple(
        CacheSlot(depth, layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
        for depth, layer in enumerate(cache.layers)
        if depth not in gone
    )
    return slots, len(cache.layers)


def check_keeps(model: nn.Module) -> None:
    import inspect

    if KEEP not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{type(model).__name__} always computes the logits of all tokens",
            expected=f"a causal language model of transformers, whose forward takes {KEEP}",
            remedy="Export it with all logits (export.last_logits: false).",
        )


def _cache_argument(model: nn.Module) -> str:
    """Under which name the model takes its cache."""
    import inspect

    known = inspect.signature(model.forward).parameters
    found = next((name for name in NAMES if name in known), None)
    if found is None or "position_ids" not in known:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not decode with a key/value cache",
            expected="a causal language model of transformers, whose forward takes a cache and position_ids",
            remedy="Export it without a cache (export.cache: false).",
        )
    return found
