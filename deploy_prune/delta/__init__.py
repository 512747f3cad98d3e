"""Diff pruning: what a task changes of a base model, learned sparse and kept apart (arXiv 2012.07463).

The names are imported from their modules when first used, so that recipes may read the options alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploy_prune.delta.task_delta import TaskDelta, stack
    from deploy_prune.delta.training import Diffed, diff

__all__ = ["Diffed", "TaskDelta", "diff", "stack"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "training" if name in ("Diffed", "diff") else "task_delta"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
