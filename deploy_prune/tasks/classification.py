"""What all single-label classification shares: cross entropy, KL to the dense model, share of right answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deploy_prune.errors import DataError
from deploy_prune.tasks.base import AGREEMENT, Batch, Task, require_target
from deploy_prune.tasks.quality import share

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from deploy_prune.data import Examples


class Classification(Task):
    """Rows are examples, outputs are logits (row, class)."""

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Cross entropy."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(output.float(), require_target(batch, self), reduction="none")

    def distance(self, output: Tensor, reference: Tensor, batch: Batch) -> Tensor:
        """KL(dense || output) in nats."""
        return divergence(output, reference)

    def _answers(self, output: Tensor, batch: Batch) -> Tensor:
        return output.argmax(-1)

    def _score(self, output: Tensor, batch: Batch) -> Tensor:
        return (output.argmax(-1) == require_target(batch, self)).double()

    def _agree(self, answers: np.ndarray, reference: np.ndarray, batch: Batch) -> np.ndarray:
        return (answers == reference).astype(float)

    def _summarise(self, rows: np.ndarray) -> tuple[float, tuple[float, float], dict[str, Any]]:
        return *share(rows), {}


def divergence(output: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || output) in nats over the last dimension of two tensors of logits."""
    log_p = reference.float().log_softmax(-1)
    log_q = output.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def class_indices(examples: Examples, classes: int, names: dict[str, int] | None, metric: str) -> list[int] | None:
    """Labels as class indices below `classes`; names are looked up in `names`.

    None when the data has no label column and the metric can do without. Raises DataError otherwise.
    """
    if "label" not in examples.columns and metric == AGREEMENT:
        return None
    labels = examples.labels()
    if all(isinstance(label, int) for label in labels):
        found = list(labels)
    else:
        unknown = sorted({str(label) for label in labels} - (names or {}).keys())
        if unknown or names is None:
            raise DataError(
                "labels are neither class indices nor names the model knows",
                where=examples.reference,
                expected=", ".join(names) if names else "integers",
                got=", ".join(unknown[:10]),
                remedy="List the names in the order of the model's outputs: ?labels=first,second",
            )
        found = [names[str(label)] for label in labels]
    outside = sorted({label for label in found if not 0 <= label < classes})
    if outside:
        raise DataError(
            "labels outside the model's classes",
            where=examples.reference,
            expected=f"0 to {classes - 1}",
            got=", ".join(map(str, outside[:10])),
            remedy="Is this the data the model was trained for?",
        )
    return found
