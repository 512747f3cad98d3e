"""How to build a model's empty shell again: enough to load a compact checkpoint without its dense one.

HF models carry their config; timm and `python:` models are remembered by name and arguments in an attribute
that `copy.deepcopy` keeps.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from deploy_prune.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from torch import nn

_ATTRIBUTE = "_deploy_prune_architecture"


@dataclass(frozen=True)
class Architecture:
    """`Architecture("timm", "vit_tiny_patch16_224", {"num_classes": 10})`.

    `name` is a timm model name, an HF class name, or `module:function`; `arguments` are the keyword arguments
    (for HF: the config as a dictionary).
    """

    library: Literal["timm", "hf", "python"]
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The model with fresh weights, in eval mode. Raises UsageError for an unknown name."""
        if self.library == "timm":
            import timm

            model = timm.create_model(self.name, pretrained=False, **self.arguments)
        elif self.library == "hf":
            import transformers

            from deploy_prune.sharing import CONFIG_KEY, share_blocks

            cls: Any = getattr(transformers, self.name, None)
            is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
            if not is_model:
                raise UsageError(
                    "not a transformers model class",
                    got=self.name,
                    remedy="Install a transformers version that has it.",
                )
            model = cls(cls.config_class.from_dict(dict(self.arguments)))
            if pattern := getattr(model.config, CONFIG_KEY, None):
                share_blocks(model, pattern)
        else:
            model = load_function(self.name)(**self.arguments)
        self.attach(model)
        return model.eval()

    def attach(self, model: nn.Module) -> None:
        """Remember on `model` how it was built."""
        setattr(model, _ATTRIBUTE, self)

    @staticmethod
    def of(model: nn.Module) -> Architecture:
        """What builds `model`. Raises UsageError for a hand-built module nobody described."""
        known = getattr(model, _ATTRIBUTE, None)
        if isinstance(known, Architecture):
            return known
        config: Any = getattr(model, "config", None)
        if hasattr(config, "to_dict") and type(model).__module__.startswith("transformers."):
            from deploy_prune.sharing import unrecorded_sharing

            if shared := unrecorded_sharing(model):
                raise UsageError(
                    "depths of this model share blocks, and its config does not say which",
                    problems=shared,
                    remedy="Share them with deploy_prune.sharing.share_blocks(model, pattern).",
                )
            return Architecture("hf", type(model).__name__, config.to_dict())
        raise UsageError(
            "this model does not say how to build it again",
            got=type(model).__name__,
            remedy="Load it with dp.load_model(reference), or call "
            'Architecture("python", "module:function").attach(model).',
        )

    def to_json(self) -> dict[str, Any]:
        return {"library": self.library, "name": self.name, "arguments": self.arguments}


def load_function(reference: str) -> Any:
    """The object `module:function` names; raises UsageError or UnavailableError when it is not there."""
    import importlib

    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise UsageError("not a python reference", expected="python:module:function", got=reference)
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise UnavailableError(
            "cannot import", where=reference, got=str(error), remedy="Is the module on PYTHONPATH?"
        ) from error
    except AttributeError as error:
        raise UsageError("no such function", where=reference, got=str(error)) from error


def weights_sha256(model: nn.Module) -> str:
    """Hex SHA-256 over the names, dtypes, shapes and bytes of all parameters and buffers, in sorted order.

    Tied tensors count once per name, so two models with equal state dicts have equal hashes.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        data = tensor.detach().cpu().contiguous().flatten()
        digest.update(memoryview(data.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
