"""Diff pruning: what a task changes of a base model, learned sparse and kept apart (arXiv 2012.07463)."""

from deploy_prune.delta.task_delta import TaskDelta, stack
from deploy_prune.delta.training import Diffed, diff

__all__ = ["Diffed", "TaskDelta", "diff", "stack"]
