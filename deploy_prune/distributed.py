"""The processes of one run: alone, or several that `accelerate launch` or `torchrun` started together.

Every process runs the same program on its share of every batch; sums are reduced, so that all hold the same numbers.
Process 0, the main one, alone writes files and prints. All functions are free of effect in a single process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from deploy_prune.errors import DeployPruneError, UnavailableError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")


class ProcessError(UnavailableError):
    """Another process of the run has ended, so that this one cannot go on."""


# Others wait this long while the main process exports and times models; a process that died is noticed at once.
_PATIENCE = timedelta(days=7)
_WORD = timedelta(seconds=3)  # for the main process to report the failure that every process met
_MESSAGE = 2**22  # numbers sent at once
_FAILURE = "deploy_prune/failure"


@dataclass(frozen=True)
class _Processes:
    """A started group. `control` is a gloo group: objects and CPU tensors go through it, whatever the devices."""

    index: int
    count: int
    device: torch.device
    control: Any


_started: _Processes | None = None


def launched() -> int:
    """How many processes the launcher says there are; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start() -> None:
    """Meet the other processes, if a launcher started several. Raises UsageError for launcher settings not honoured."""
    global _started
    if _started is not None or launched() == 1:
        return
    _refuse_settings()
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    _started = _Processes(dist.get_rank(), dist.get_world_size(), state.device, control)


def finish() -> None:
    """Part from the other processes after a run that went well."""
    global _started
    if _started is not None:
        import torch.distributed as dist

        dist.destroy_process_group()
        _started = None


def count() -> int:
    return _started.count if _started else 1


def index() -> int:
    """This process's number; 0 is the main one."""
    return _started.index if _started else 0


def is_main() -> bool:
    return index() == 0


def device() -> torch.device | None:
    """The device that the launcher gave this process; None in a single process."""
    return _started.device if _started else None


def reduce(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums over all processes, by key; a process that has nothing for a key adds zero.

    Every process gets the same bits. Raises UnavailableError when another process has ended.
    """
    if _started is None:
        return dict(tensors)
    import torch

    known: dict[str, tuple[torch.dtype, tuple[int, ...], torch.device]] = {}
    for shapes in all_gather({key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}):
        for key, (dtype, shape) in shapes.items():
            here = tensors[key].device if key in tensors else torch.device("cpu")
            if known.setdefault(key, (dtype, shape, here))[:2] != (dtype, shape):
                raise UsageError("processes disagree about a sum", where=key, got=f"{known[key][:2]}, {(dtype, shape)}")
    total: dict[str, Tensor] = {}
    for keys in _messages({key: (dtype, math.prod(shape)) for key, (dtype, shape, _) in known.items()}):
        zeros = {key: torch.zeros(known[key][1], dtype=known[key][0]) for key in keys if key not in tensors}
        parts = [(tensors[key].detach().cpu() if key in tensors else zeros[key]).flatten() for key in keys]
        message = torch.cat(parts)
        _all_reduce(message)
        for key, part in zip(keys, message.split([len(part) for part in parts]), strict=True):
            total[key] = part.view(known[key][1]).to(known[key][2])
    return {key: total[key] for key in known}


def all_gather(value: T) -> list[T]:
    """Every process's value, by process number."""
    if _started is None:
        return [value]
    values: list[Any] = [None] * _started.count
    _collective(lambda dist, control: dist.all_gather_object(values, value, group=control))
    return values


def gather(value: T) -> list[T]:
    """Every process's value, by process number, in the main process; [] elsewhere."""
    if _started is None:
        return [value]
    values: list[Any] | None = [None] * _started.count if is_main() else None
    _collective(lambda dist, control: dist.gather_object(value, values, dst=0, group=control))
    return values or []


def broadcast(value: T) -> T:
    """The main process's value, everywhere."""
    if _started is None:
        return value
    box = [value if is_main() else None]
    _collective(lambda dist, control: dist.broadcast_object_list(box, src=0, group=control))
    return box[0]  # type: ignore[return-value]


def from_main(function: Callable[[], T]) -> T:
    """What `function` returns in the main process, which alone calls it; its DeployPruneError is raised everywhere."""
    if _started is None:
        return function()
    result: Any = None
    error: DeployPruneError | None = None
    if is_main():
        try:
            result = function()
        except DeployPruneError as caught:
            error = caught
            reports(error)  # before the others, who may have met the same failure and be on their way out
    try:
        error, result = broadcast((error, result))
    except ProcessError:
        if error is None:
            raise
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def require_same(what: str, value: Any, remedy: str) -> None:
    """Raise UsageError unless every process holds the same `value`."""
    values = all_gather(value)
    if any(other != values[0] for other in values):
        raise UsageError(
            f"processes disagree about {what}",
            expected=f"process 0: {values[0]}",
            got=", ".join(f"process {i}: {other}" for i, other in enumerate(values) if other != values[0]),
            remedy=remedy,
        )


def explain(error: BaseException) -> ProcessError | None:
    """In words, the failure that the end of another process causes here; None when `error` is something else."""
    if _started is None or not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if not any(word in text for word in ("gloo", "NCCL", "nccl", "Connection closed by peer", "Connection reset")):
        return None
    return ProcessError(
        "another process of this run has ended",
        got=text.splitlines()[0][:200],
        remedy="Its own message says why, unless it was killed; nothing half-written was kept, and `--resume` goes on.",
    )


def reports(error: BaseException) -> bool:
    """Whether this process should print its failure: what all met, and what the main one's end causes, it tells."""
    if _started is None:
        return launched() == 1 or os.environ.get("RANK", "0") == "0"
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        store = _get_default_store()
        if is_main():
            store.set(_FAILURE, str(error))
            return True
        store.wait([_FAILURE], _WORD)
        return not isinstance(error, ProcessError) and bool(store.get(_FAILURE).decode() != str(error))
    except RuntimeError:  # nobody to ask, or the main process has not failed
        return True


def _all_reduce(message: Tensor) -> None:
    _collective(lambda dist, control: dist.all_reduce(message, group=control))


def _collective(call: Callable[[Any, Any], Any]) -> None:
    import torch.distributed as dist

    assert _started is not None
    try:
        call(dist, _started.control)
    except RuntimeError as error:
        known = explain(error)
        if known is None:
            raise
        raise known from error


def _messages(sizes: Mapping[str, tuple[Any, int]]) -> list[list[str]]:
    """Keys that travel together: tensors of one type, until a message is large."""
    messages: list[list[str]] = []
    room: dict[Any, int] = {}
    latest: dict[Any, list[str]] = {}
    for key, (dtype, size) in sizes.items():
        if size > room.get(dtype, 0):
            latest[dtype], room[dtype] = [], _MESSAGE
            messages.append(latest[dtype])
        latest[dtype].append(key)
        room[dtype] -= size
    return messages


def _refuse_settings() -> None:
    problems = []
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        problems.append("deepspeed: not supported; for models larger than one device use FSDP (compute.shard)")
    if (precision := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) not in ("no", "bf16"):
        problems.append(f"mixed precision {precision}: the search knows bf16 and fp32 (search.precision)")
    if problems:
        raise UsageError(
            "the launcher asks for what this program does not do",
            problems=problems,
            remedy="Change these in `accelerate config`, or on the command line of `accelerate launch`.",
        )


def sharded_by_launcher() -> bool:
    """Whether `accelerate launch --use_fsdp` asked for weights that are spread over the processes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
