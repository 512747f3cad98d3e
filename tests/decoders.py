"""Decoders cut unevenly and exported with their cache, once per session."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import conftest
import torch
from forms import random_path, signature_of

from converters.decoder_export import DecoderReport, export_decoder
from converters.surgery import compact
from deploy_prune.adapters import find_sites
from deploy_prune.plan import plan_from_units
from deploy_prune.units import PER_HEAD, SiteKind, groups

_ROOM = tempfile.TemporaryDirectory(prefix="deploy-prune-decoders-")
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(95))]


def build(name: str) -> Any:
    """The tiny model of a fixture, outside of any test."""
    fixture = getattr(conftest, name)
    return (getattr(fixture, "__wrapped__", None) or fixture.__pytest_wrapped__.obj)()


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@cache
def exported(name: str, how: str, variant: Any = "plain", last_logits: bool = False) -> tuple[Any, Path, DecoderReport]:
    """(compact model, its directory, report). `how`: "uneven" cuts all kinds at random; "gone" takes the first
    attention whole, and one head of the last; "heads" leaves widths, and other heads in every layer."""
    model = build(name)
    if how == "uneven":
        plan = random_path(model, signature_of(name), seed=4).plan(0.3)
    else:
        sites = find_sites(model)
        attentions = [s for s in sites if s.kind is SiteKind.ATTENTION]
        kept: dict[Any, Any] = {}
        for site, kind in groups(sites):
            fewer = site.lanes(kind) > 1 or kind.value == "head"
            first = {"gone": site.units(kind) if site is attentions[0] else 0, "heads": 0}[how]
            last = site.units(kind) // site.kv_heads if fewer and site is attentions[-1] else 0
            kept[site.name, kind] = range(
                max(first, last if kind in PER_HEAD or kind.value == "head" else 0), site.units(kind)
            )
        plan = plan_from_units("tiny", random_path(model, signature_of(name)).weights_sha256, sites, kept)
    small = compact(model, plan)
    directory = Path(_ROOM.name) / f"{name}-{how}-{variant}{'-last' if last_logits else ''}"
    opset = 18 if variant == "plain" else 20
    report = export_decoder(
        small, directory, tokenizer=tokenizer(), opset=opset, variant=variant, last_logits=last_logits
    )
    return small, directory, report


def written(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What torch's `generate` adds greedily to prompts padded on the left, never stopping."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    model.generation_config.eos_token_id = None
    made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return made[:, width:].tolist()
