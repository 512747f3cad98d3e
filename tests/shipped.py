"""Tiny models as they ship: their signatures and, exported once per session, their ONNX files."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from converters.onnx_export import ExportReport, export_onnx
from deploy_prune.signature import Signature, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

MODELS = ("tiny_vit", "tiny_bert", "tiny_distilbert", "tiny_llama")
TEXT = (
    TensorSpec("input_ids", "int64", ("batch", "sequence"), "ids", high=99),
    TensorSpec("attention_mask", "int64", ("batch", "sequence"), "mask"),
)


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def _decoder_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return model(**inputs, use_cache=False).logits


def _embedding(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    import torch

    hidden = model.bert(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=-1)


SIGNATURES = {
    "tiny_vit": Signature((TensorSpec("images", "float32", ("batch", 3, 32, 32)),),
                          TensorSpec("logits", "float32", ("batch", 5)), lambda model, x: model(x["images"])),
    "tiny_bert": Signature(TEXT, TensorSpec("logits", "float32", ("batch", 3)), _logits),
    "tiny_distilbert": Signature(TEXT, TensorSpec("logits", "float32", ("batch", 2)), _logits),
    "tiny_llama": Signature(TEXT, TensorSpec("logits", "float32", ("batch", "sequence", 99)), _decoder_logits),
}
EMBEDDING = Signature(TEXT, TensorSpec("embeddings", "float32", ("batch", 32)), _embedding)

_ROOM = tempfile.TemporaryDirectory(prefix="deploy-prune-tests-")
_reports: dict[str, ExportReport] = {}


def exported(name: str, model: nn.Module, signature: Signature | None = None) -> tuple[Path, ExportReport]:
    """The ONNX file of `model`, which must be the same for every call with this `name`; do not write to it."""
    path = Path(_ROOM.name) / f"{name}.onnx"
    if name not in _reports:
        _reports[name] = export_onnx(model, path, signature or SIGNATURES[name])
    return path, _reports[name]


@cache
def session(path: Path):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run_onnx(path: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    import torch

    return torch.from_numpy(session(path).run(None, {k: v.numpy() for k, v in inputs.items()})[0])
