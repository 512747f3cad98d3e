"""Student and teacher side by side: both see the same inputs, and their hidden states are caught on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deploy_prune.blocks import activation_checkpointing, sharded
from deploy_prune.methods.compute import Compute
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
        dense_sites: Sequence[Site],
        layers: Sequence[str],
        device: torch.device,
        bf16: bool,
        hidden: bool,
        drop_path: float,
        compute: Compute,
    ) -> None:
        """`called` computes the student's output, perhaps wrapped for several processes. `hidden` catches the states of
        `layers`."""
        self._student, self._called, self._teacher, self._signature = student, called, teacher, signature
        self._sites, self._sites_of_teacher, self._layers = sites, dense_sites, layers
        self._device, self._bf16, self._compute = device, bf16, compute
        self._hidden, self._drop_path = hidden, drop_path
        self._stack = ExitStack()
        self._own, self._dense = Record(), Record()

    def __enter__(self) -> Pair:
        enter = self._stack.enter_context
        if self._teacher is not None:
            self._teacher = enter(_lent(self._teacher, self._sites_of_teacher, self._device, self._compute.shard))
        if self._hidden:
            assert self._teacher is not None
            self._own = enter(recording(self._student, self._layers))
            self._dense = enter(recording(self._teacher, self._layers))
        self._paths = enter(dropping_paths(self._student, self._sites, self._layers, self._drop_path))
        if self._compute.activation_checkpointing:
            enter(activation_checkpointing(self._student, self._sites))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def own(self, inputs: Mapping[str, Tensor], *, training: bool = False) -> tuple[Tensor, list[Tensor]]:
        """The student's output, float32, and its hidden states; sublayers are dropped only in `training`."""
        self._own.take()  # what activations computed again have left
        self._paths.clear()
        if training:
            self._paths.draw(len(next(iter(inputs.values()))))
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
def _lent(teacher: nn.Module, sites: Sequence[Site], device: torch.device, shard: bool) -> Iterator[nn.Module]:
    """The teacher on `device` in eval mode, or spread over the processes; afterwards where and as it was."""
    place, training = next(teacher.parameters()).device, teacher.training
    teacher.eval()
    try:
        if shard:
            with sharded(teacher, sites, device) as spread:
                yield spread
        else:
            yield teacher.to(device)
    finally:
        teacher.to(place).train(training)
