"""Student and teacher side by side: both see the same inputs, and their hidden states are caught on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deploy_prune.recovery.hidden import Record, recording
from deploy_prune.recovery.regularise import dropping_paths
from deploy_prune.units import Site

if TYPE_CHECKING:
    from deploy_prune.signature import Signature


class Called(nn.Module):
    """The task's function of a model as a module of its own, for wrappers that only see `forward`."""

    def __init__(self, model: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.model, self._call = model, signature.call

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self._call(self.model, inputs)


class Pair:
    """The compact model that learns and the dense one that teaches, on one device. A context: hooks live inside it."""

    def __init__(
        self,
        student: nn.Module,
        called: nn.Module,
        teacher: nn.Module | None,
        signature: Signature,
        *,
        sites: Sequence[Site],
        layers: Sequence[str],
        device: torch.device,
        bf16: bool,
        hidden: bool,
        drop_path: float,
        recompute: bool,
    ) -> None:
        """`called` computes the student's output, perhaps wrapped for several processes. `hidden` catches the states of
        `layers`; `drop_path` and `recompute` are those of the options."""
        self._student, self._called, self._teacher, self._signature = student, called, teacher, signature
        self._sites, self._layers, self._device, self._bf16 = sites, layers, device, bf16
        self._hidden, self._drop_path, self._recompute = hidden, drop_path, recompute
        self._stack = ExitStack()
        self._own, self._dense = Record(), Record()

    def __enter__(self) -> Pair:
        enter = self._stack.enter_context
        if self._teacher is not None:
            enter(_lent(self._teacher, self._device))
        if self._hidden:
            assert self._teacher is not None
            self._own = enter(recording(self._student, self._layers))
            self._dense = enter(recording(self._teacher, self._layers))
        self._paths = enter(dropping_paths(self._student, self._sites, self._layers, self._drop_path))
        enter(recomputing(self._student, self._layers if self._recompute else []))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def own(self, inputs: Mapping[str, Tensor], *, training: bool = False) -> tuple[Tensor, list[Tensor]]:
        """The student's output, float32, and its hidden states; sublayers are dropped only in `training`."""
        self._paths.rows = len(next(iter(inputs.values()))) if training else 0
        with self._autocast():
            output = self._called(self._here(inputs)).float()
        return output, self._own.take()

    @torch.no_grad()
    def dense(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The same of the teacher."""
        assert self._teacher is not None
        with self._autocast():
            output = self._signature.call(self._teacher, self._here(inputs)).float()
        return output, self._dense.take()

    def _here(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self._device) for name, tensor in inputs.items()}

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16) if self._bf16 else nullcontext()


@contextmanager
def _lent(teacher: nn.Module, device: torch.device) -> Iterator[None]:
    """The teacher on `device` in eval mode; afterwards where and as it was."""
    place, training = next(teacher.parameters()).device, teacher.training
    teacher.to(device).eval()
    try:
        yield
    finally:
        teacher.to(place).train(training)


@contextmanager
def recomputing(model: nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """Within the block the named modules keep only their inputs and are computed again in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    modules: list[Any] = [model.get_submodule(name) for name in layers]
    for module in modules:
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    try:
        yield
    finally:
        for module in modules:
            del module.forward
