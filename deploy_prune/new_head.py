"""A fresh classification head on a pretrained encoder, the same at every load, for a task that is yet to be learned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import UsageError
from deploy_prune.quiet import without_load_report, without_progress_bars
from deploy_prune.weights import check_keys

if TYPE_CHECKING:
    from torch import nn


def with_new_head(folder: Path, where: str, classes: Any, arguments: dict[str, Any]) -> nn.Module:
    """The encoder in `folder` under a fresh classification head of `classes`.

    Raises UsageError for no number of classes, ArtifactError when the encoder is not whole.
    """
    import torch
    import transformers

    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
        raise UsageError("not a number of classes", where=where, expected="new_head=2", got=f"new_head={classes}")
    arguments.setdefault("attn_implementation", "sdpa")
    with torch.random.fork_rng(devices=[]), without_progress_bars(), without_load_report():
        torch.manual_seed(0)
        try:
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                num_labels=classes,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **arguments,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                "no classification head for this model", where=where, got=str(error).splitlines()[0]
            ) from error
        body = f"{model.base_model_prefix}."
        absent = {name for name in info["missing_keys"] if name.startswith(body)}
        absent -= {name for name in absent if ".pooler." in name}  # encoders published without it
        misshapen = [(n, tuple(a), tuple(b)) for n, a, b in info["mismatched_keys"] if n.startswith(body)]
        check_keys(str(folder), missing=absent, misshapen=misshapen)
        fresh = {name.rpartition(".")[0] for name in info["missing_keys"]}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and (name in fresh or not name.startswith(body)):
                torch.nn.init.normal_(module.weight, std=getattr(model.config, "initializer_range", 0.02))
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)
    return model
