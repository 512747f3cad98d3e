"""The repeated blocks of a model, and two ways to need less memory for them: computing again, and sharing out.

A block is a member of the list of layers in which the sites lie. Both ways change nothing but memory and time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deploy_prune.errors import UnsupportedModelError, UsageError
from deploy_prune.units import Site

if TYPE_CHECKING:
    from collections.abc import Callable


def blocks(model: nn.Module, sites: Sequence[Site]) -> list[nn.Module]:
    """The blocks that hold the sites, in model order. Raises UnsupportedModelError when a site is in none."""
    found: dict[str, nn.Module] = {}
    lonely = []
    for site in sites:
        names = site.out.split(".")
        for depth in range(1, len(names)):
            parent = model.get_submodule(".".join(names[:depth]))
            if isinstance(parent, (nn.ModuleList, nn.Sequential)) and depth + 1 < len(names):
                name = ".".join(names[: depth + 1])
                found[name] = model.get_submodule(name)
                break
        else:
            lonely.append(site.name)
    if lonely:
        raise UnsupportedModelError(
            "the model has no list of blocks to save memory with",
            problems=lonely,
            expected="every site inside a member of a torch.nn.ModuleList or Sequential",
            remedy="Do without activation checkpointing and sharding.",
        )
    return list(found.values())


@contextmanager
def activation_checkpointing(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Within the block a forward pass keeps each block's input only; the way back computes the rest again.

    Hooks that change activations must still be in place on the way back (`Context.gradients` sees to it).
    """
    from torch.utils.checkpoint import checkpoint

    def again(forward: Callable[..., Any]) -> Callable[..., Any]:
        def checkpointed(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return checkpointed

    changed = [(block, vars(block).get("forward")) for block in blocks(model, sites)]
    for block, _ in changed:
        block.forward = again(block.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block, own in changed:
            del block.forward  # the class's own shows again
            if own is not None:
                block.forward = own  # type: ignore[method-assign]


@contextmanager
def sharded(model: nn.Module, sites: Sequence[Site], device: torch.device) -> Iterator[nn.Module]:
    """A twin of `model` whose weights are spread over all processes, as `shard` does.

    `model` itself stays as it is, where it is. Raises UsageError in a single process.
    """
    twin = _twin(model)
    shard(twin, sites, device)
    yield twin


def shard(model: nn.Module, sites: Sequence[Site], device: torch.device) -> None:
    """Spread the weights of `model`, in place, over all processes (FSDP), one block at a time whole on `device`.

    Raises UsageError in a single process.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        raise UsageError(
            "weights can be spread over several processes only",
            remedy="Start with `accelerate launch --num_processes N -m deploy_prune ...`, or do without compute.shard.",
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks(model, sites):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def whole(tensor: Tensor) -> Tensor:
    """All of a parameter, also when it is spread over the processes; all must ask for it."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def _twin(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares every tensor with `model`."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    shared.update({id(b): b for b in model.buffers()})
    return copy.deepcopy(model, shared)
