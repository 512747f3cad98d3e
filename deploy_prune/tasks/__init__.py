"""The registry of tasks: to add one, write a file with a `Task` subclass and its `create`, and name it here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import UsageError, did_you_mean
from deploy_prune.tasks.base import Batch, Task
from deploy_prune.tasks.quality import Quality

if TYPE_CHECKING:
    from torch import nn

    from deploy_prune.data import Examples

__all__ = ["Batch", "Quality", "TASKS", "Task", "load_task", "task_class"]

TASKS = {
    "image-classification": "deploy_prune.tasks.image_classification:ImageClassification",
    "image-text": "deploy_prune.tasks.image_text:ImageText",
    "text-classification": "deploy_prune.tasks.text_classification:TextClassification",
    "prompted-classification": "deploy_prune.tasks.prompted_classification:PromptedClassification",
    "causal-lm": "deploy_prune.tasks.causal_lm:CausalLM",
    "sentence-embedding": "deploy_prune.tasks.sentence_embedding:SentenceEmbedding",
}


def task_class(name: str) -> type[Task]:
    """The class of a task. Raises UsageError for an unknown name."""
    if name not in TASKS:
        raise UsageError("unknown task", got=name, remedy=did_you_mean(name, list(TASKS)))
    module, _, attribute = TASKS[name].partition(":")
    found: type[Task] = getattr(importlib.import_module(module), attribute)
    return found


def load_task(
    name: str,
    *,
    model: nn.Module,
    model_ref: str,
    calibration: str | Examples,
    evaluation: str | Examples | None = None,
    **options: Any,
) -> Task:
    """The task `name` for a loaded `model`, on the data that two references name.

    `options` are those of the task's `create`. Raises UsageError for an unknown task or option, DataError for data the
    task cannot use.
    """
    import inspect

    from deploy_prune.data import load_data
    from deploy_prune.tasks.base import unknown_options

    cls = task_class(name)
    parameters = inspect.signature(cls.create).parameters
    unknown_options(name, options, [p for p in parameters if parameters[p].kind is inspect.Parameter.KEYWORD_ONLY])
    calibration_data = load_data(calibration) if isinstance(calibration, str) else calibration
    evaluation_data = load_data(evaluation) if isinstance(evaluation, str) else evaluation
    return cls.create(model, model_ref, calibration_data, evaluation_data, **options)
