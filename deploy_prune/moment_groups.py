"""Moments of as many sites at a time as fit into memory, each group written to a file of its own before the next.

A site whose output projection reads d features takes d² float64 numbers, three times that while they are made, six
times where tokens are weighted by what the loss feels of them. With
`limit` bytes for one pass over the data, a model of any depth needs ceil(all its sites / limit) passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deploy_prune import distributed
from deploy_prune.layers import layer_at, width
from deploy_prune.methods.compute import Compute, share
from deploy_prune.progress import SILENT, Progress
from deploy_prune.refitting import EMPHASIS, collect_moments, load_moments, save_moments

if TYPE_CHECKING:
    from torch import nn

    from deploy_prune.tasks.base import Losses, Task
    from deploy_prune.units import Site

# Of d x d float64 that a site takes at the most: the sum, the result and what is reduced; with weighted tokens the same
# of both parts.
MATRICES, WEIGHTED = 3, 6


def moment_bytes(model: nn.Module, site: Site, *, weighted: bool) -> int:
    """Memory that the moments of one site take while they are made."""
    return int((WEIGHTED if weighted else MATRICES) * 8 * width(layer_at(model, site.out), "in") ** 2)


def groups_within(model: nn.Module, sites: Sequence[Site], limit: float, *, weighted: bool) -> list[list[Site]]:
    """The sites in model order, in as few groups as stay below `limit` bytes; one that does not is a group alone."""
    groups: list[list[Site]] = []
    free = 0.0
    for site in sites:
        size = moment_bytes(model, site, weighted=weighted)
        if not groups or size > free:
            groups.append([])
            free = limit
        groups[-1].append(site)
        free -= size
    return groups


def collect_to(
    directory: Path,
    model: nn.Module,
    sites: Sequence[Site],
    task: Task,
    order: Sequence[Sequence[int]],
    *,
    limit: float,
    losses: Losses | None = None,
    emphasis: float = EMPHASIS,
    compute: Compute | None = None,
    progress: Progress = SILENT,
) -> None:
    """Write the moments of all sites over the batches `order` into `directory`, for `load_moments`.

    `losses` and `emphasis` are as for `collect_moments`. Every process of the run takes part; the main one writes.
    Groups that an earlier call left whole in `directory` are not made again: it must be one for this model, data, order
    and emphasis alone. Raises what `collect_moments` raises.
    """
    compute = compute or Compute()
    groups = groups_within(model, sites, limit, weighted=losses is not None and emphasis > 0)
    done = distributed.from_main(lambda: set(load_moments(directory)) if directory.is_dir() else set())
    progress.start(len(order) * len(groups), "moments")
    try:
        for group in groups:
            if all(site.name in done for site in group):
                progress.advance(len(order))
                continue
            batches = share(task, order, compute, progress)
            moments = collect_moments(
                model,
                group,
                batches,
                task.signature,
                losses=losses,
                emphasis=emphasis,
                together=distributed.count() > 1,
            )
            file = directory / f"{group[0].name}.safetensors"
            distributed.from_main(lambda moments=moments, file=file: save_moments(moments, file))  # type: ignore[misc]
    finally:
        progress.finish()
