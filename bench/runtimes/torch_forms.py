"""The torch model behind an ONNX file of ours: its checkpoint, and which function of it the file computes.

A bundle keeps a checkpoint beside every member: models/NAME.onnx and checkpoints/NAME. Of the dense model it keeps
none; as latency does not depend on weights, its architecture with random ones stands in, and the session says so. That
a checkpoint computes what the ONNX file does is proved on the inputs it is timed with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import UnavailableError
from deploy_prune.files import existing

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

DENSE = "dense"
OWN = "those of the checkpoint"
RANDOM = "random: a bundle keeps no checkpoint of the dense model"
AGREES = 0.1  # of the largest output: tells one function from another, also where the ONNX file is in fp16 or int8
Function = Callable[["nn.Module", Mapping[str, "Tensor"]], "Tensor"]


@dataclass(frozen=True)
class TorchForm:
    """A model in eval mode, whether its `weights` are its own, and the ONNX file it is the torch form of."""

    model: nn.Module
    weights: str
    onnx: Path

    def function(self, inputs: Mapping[str, np.ndarray]) -> Function:
        """What of the model the ONNX file computes. Raises UnavailableError when none of the functions known here gives
        its answer on `inputs`."""
        import numpy as np
        import torch

        from converters.onnx_session import OnnxSession

        expected = OnnxSession(self.onnx).run(inputs)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        with torch.no_grad():
            for function in FUNCTIONS:
                found = function(self.model, tensors)
                if found is None or tuple(found.shape) != expected.shape:
                    continue
                off = float(np.abs(found.float().numpy() - expected).max()) / max(float(np.abs(expected).max()), 1e-9)
                if self.weights != OWN or off <= AGREES:
                    return function  # type: ignore[return-value]
        raise UnavailableError(
            "the checkpoint does not compute what the ONNX file does, in any way known here",
            where=self.onnx.name,
            expected=f"an output of shape {expected.shape}",
            remedy="Time it with ort-cpu, ort-cuda or openvino, which run the ONNX file itself.",
        )


def torch_form(onnx: Path | str, *, trust_code: bool = False) -> TorchForm:
    """The torch form of `BUNDLE/models/NAME.onnx`. Raises UnavailableError where there is no checkpoint, UsageError for
    one that would run Python code without `trust_code`, ArtifactError for a damaged one."""
    from converters.checkpoint import load_pruned

    path = existing(onnx, "ONNX file")
    own = _checkpoint_of(path)
    if own is not None:
        return TorchForm(load_pruned(own, trust_code=trust_code), OWN, path)
    sibling = _any_checkpoint(path) if path.stem == DENSE else None
    if sibling is None:
        raise UnavailableError(
            "no checkpoint belongs to this ONNX file",
            where=str(path),
            expected=f"a bundle with checkpoints/{path.stem}",
            remedy="Make the bundle with export.checkpoints: true, or time another runtime.",
        )
    return TorchForm(_dense_shell(sibling, trust_code), RANDOM, path)


def _dense_shell(checkpoint: Path, trust_code: bool) -> nn.Module:
    import torch

    from converters.checkpoint import ARCHITECTURE, read_architecture

    with torch.random.fork_rng():
        return read_architecture(checkpoint / ARCHITECTURE, trust_code).build().eval()


def _checkpoint_of(onnx: Path) -> Path | None:
    """In a bundle, or in a stage of a run."""
    for place in (onnx.parent.parent / "checkpoints" / onnx.stem, onnx.parent / "checkpoint"):
        if place.is_dir():
            return place
    return None


def _any_checkpoint(onnx: Path) -> Path | None:
    folder = onnx.parent.parent
    found = [*sorted((folder / "checkpoints").glob("*")), *sorted(folder.glob("*/checkpoint"))]
    return next((place for place in found if place.is_dir()), None)


def _answer(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """The model's own output: by keyword where its forward has such names (transformers), else by position (timm)."""
    names = inspect.signature(model.forward).parameters
    if set(inputs) <= set(names):
        more = {"use_cache": False} if "use_cache" in names else {}
        return model(**inputs, **more)
    return model(*inputs.values())


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor | None:
    found = _answer(model, inputs)
    tensor = found if hasattr(found, "shape") else getattr(found, "logits", None)
    return tensor


def _mean(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor | None:
    hidden = getattr(_answer(model, inputs), "last_hidden_state", None)
    mask = inputs.get("attention_mask")
    if hidden is None or mask is None:
        return None
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def _normalised_mean(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor | None:
    mean = _mean(model, inputs)
    return None if mean is None else mean / mean.norm(dim=-1, keepdim=True)


def _first(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor | None:
    hidden = getattr(_answer(model, inputs), "last_hidden_state", None)
    return None if hidden is None else hidden[:, 0]


FUNCTIONS: tuple[Callable[[Any, Mapping[str, Any]], Any], ...] = (
    _logits,
    _mean,
    _normalised_mean,
    _first,
)
