"""Blocks that serve several depths of a model, as in MobileLLM (arXiv 2402.14905): one set of weights, one cut.

A depth that uses an earlier depth's block holds a `SharedBlock` around it. The pattern is part of the model's config
(`shared_blocks`), so that checkpoints know how to build the model again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from deploy_prune.errors import UnsupportedModelError, UsageError

CONFIG_KEY = "shared_blocks"


class SharedBlock(nn.Module):
    """One more use of `block`. Its depth `layer_idx` is its place in a key/value cache, which no use may share."""

    def __init__(self, block: nn.Module, layer_idx: int) -> None:
        super().__init__()
        self.block, self.layer_idx = block, layer_idx

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _placed(self.block, self.layer_idx):
            return self.block(*args, **kwargs)


def share_blocks(model: Any, pattern: Sequence[int]) -> Any:
    """Let every depth d of a transformers model use the block of depth pattern[d], in place; returns the model.

    `share_blocks(model, (0, 0, 2, 2))`: the blocks of depths 1 and 3 go, those of 0 and 2 are used twice each. The
    pattern names depths that keep their own block. Raises UsageError for another pattern, UnsupportedModelError for a
    model without a config or without one list of blocks.
    """
    if not hasattr(model, "config"):
        raise UnsupportedModelError(
            "blocks of this model cannot be shared",
            got=type(model).__name__,
            expected="a transformers model, whose config keeps the pattern",
        )
    blocks = _block_list(model)
    pattern = [int(depth) for depth in pattern]
    problems = [
        f"depth {depth} uses block {source}, which is not an earlier depth with a block of its own"
        for depth, source in enumerate(pattern)
        if not 0 <= source <= depth or pattern[source] != source
    ]
    if len(pattern) != len(blocks):
        problems.append(f"{len(pattern)} entries, the model has {len(blocks)} blocks")
    if problems:
        raise UsageError("not a pattern of shared blocks", got=str(pattern), problems=problems)
    for depth, source in enumerate(pattern):
        if source != depth:
            blocks[depth] = SharedBlock(blocks[source], depth)
    setattr(model.config, CONFIG_KEY, pattern)
    return model


def unrecorded_sharing(model: nn.Module) -> list[str]:
    """Lists of blocks in which one module stands twice without `share_blocks`: such a model cannot be built again."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({id(member) for member in module}) < len(module)
    ]


def _block_list(model: nn.Module) -> nn.ModuleList:
    """The one list in which all sites lie."""
    from deploy_prune.adapters import find_sites

    found: dict[int, nn.ModuleList] = {}
    for site in find_sites(model):
        names = site.out.split(".")
        parents = (model.get_submodule(".".join(names[:depth])) for depth in range(1, len(names)))
        first = next((parent for parent in parents if isinstance(parent, nn.ModuleList)), None)
        if first is not None:
            found[id(first)] = first
    if len(found) != 1:
        raise UnsupportedModelError(
            "blocks of this model cannot be shared",
            got=f"{len(found)} lists of blocks",
            expected="one torch.nn.ModuleList that holds all sites",
        )
    return next(iter(found.values()))


@contextmanager
def _placed(block: nn.Module, layer_idx: int) -> Iterator[None]:
    """Within the block its attention takes the place `layer_idx` in the cache."""
    before = [
        (module, module.layer_idx) for module in block.modules() if getattr(module, "layer_idx", None) is not None
    ]
    for module, _ in before:
        module.layer_idx = layer_idx  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, own in before:
            module.layer_idx = own
