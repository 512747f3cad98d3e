"""The proof of a converted file: its weights are the twin's, rounded; its outputs are near; its predictions agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.precision.formats import HALF, LIMITS, WEIGHT_ONLY, Limit
from converters.precision.int8 import saturates
from deploy_prune.errors import ArtifactError, ParityError

Asked = Callable[[Path | str, str], "Callable[[Inputs], np.ndarray]"]  # (file, its precision) -> what it answers

if TYPE_CHECKING:
    import numpy as np

    Inputs = Mapping[str, np.ndarray]
    # (output, the twin's output, inputs) -> per example 1 or 0, a cosine, or (agreeing tokens, all tokens)
    Agree = Callable[[np.ndarray, np.ndarray, Inputs], np.ndarray]


@dataclass(frozen=True)
class PrecisionParity:
    """How equal a converted file is to its fp32 twin; made only when it is equal enough.

    `error` is the worst max|a − b| / max|a| of a batch, `agreement` the share of `examples` with the same prediction.
    """

    precision: str
    error: float
    tolerance: float
    agreement: float
    floor: float
    examples: int

    def to_json(self) -> dict[str, Any]:
        """With the pair in the form that `ParityReport` has."""
        pair = {"reference": "fp32", "candidate": self.precision, "tolerance": self.tolerance, "error": self.error}
        return {**asdict(self), "pairs": [{**pair, "agreement": self.agreement}]}


def asked_of(path: Path | str, precision: str) -> Callable[[Inputs], np.ndarray]:
    """What a file answers on this machine's CPU: half precisions are rounded as a GPU would round them."""
    from converters.onnx_session import OnnxSession
    from converters.precision.emulate import Emulated

    return Emulated(path).run if precision in HALF else OnnxSession(path).run


def prove(
    twin: Path | str,
    candidate: Path | str,
    precision: str,
    batches: Sequence[Inputs],
    *,
    made_up: Iterable[Inputs] = (),
    agree: Agree | None = None,
    mask: str | None = None,
    limit: Limit | None = None,
    where: str | None = None,
    asked: Asked = asked_of,
) -> PrecisionParity:
    """Compare a converted file with its twin on real `batches`, and on `made_up` ones at other sizes: there outputs of
    quantised files need only be finite and of the right shape, as noise is not what they are made for.

    `agree` compares predictions (default: argmax over the last axis); `mask` names the input that marks the positions
    of an output per token that count; `asked` is how a file in a precision is asked. Raises ParityError with every
    figure beyond its `limit` (default: `LIMITS`).
    """
    import math

    import numpy as np

    from converters.comparison import compare
    from converters.precision.stored import stored_faults

    limit, agree = limit or LIMITS[precision], agree or argmax_agrees
    problems = stored_faults(twin, candidate, precision)
    reference, answer = asked(twin, "fp32"), asked(candidate, precision)
    error, rows = 0.0, []
    kinds = [(inputs, True) for inputs in batches] + [(inputs, False) for inputs in made_up]
    for number, (inputs, real) in enumerate(kinds):
        tolerance = limit.error if real or precision in HALF else math.inf
        said = f"{'example' if real else 'made-up'} batch {number}"
        try:
            want, got = reference(inputs), answer(inputs)
        except ArtifactError as fault:
            problems.append(f"{said}: {fault.what}: {fault.got}")
            continue
        found = compare(want, got, tolerance=tolerance, valid=inputs[mask] if mask else None)
        if found.fault is not None or found.error > tolerance:
            problems.append(f"{said}: {found.fault or f'error {found.error:.2g}, limit {tolerance:g}'}")
        if real or precision in HALF:
            error = max(error, found.error)
        if real and found.fault is None:
            rows.append(np.asarray(agree(got, want, inputs), np.float64))
    agreement = _share(rows)
    if not agreement >= limit.agreement:
        problems.append(f"predictions agree on {agreement:.1%} of the examples, limit {limit.agreement:.1%}")
    if problems:
        remedy = "Keep nodes in fp32 (precision.keep), take another precision or calibration, or allow more "
        remedy += f"(precision.tolerance, precision.agreement for {precision})."
        if precision not in (*HALF, *WEIGHT_ONLY) and saturates():
            remedy += " This CPU has no VNNI, so sums of its int8 kernels saturate: precision.reduce_range=true stores "
            remedy += "weights in 7 bits."
        raise ParityError(
            f"the {precision} file is not its fp32 twin, rounded",
            where=where or Path(candidate).name,
            problems=problems[:30],
            remedy=remedy,
        )
    return PrecisionParity(precision, error, limit.error, agreement, limit.agreement, sum(map(len, rows)))


def argmax_agrees(output: np.ndarray, reference: np.ndarray, inputs: Inputs) -> np.ndarray:
    """Per example, whether the largest output is the same one; of an output per token, how many are, of how many."""
    import numpy as np

    del inputs
    same = (output.argmax(-1) == reference.argmax(-1)).reshape(len(output), -1)
    return np.stack([same.sum(1), np.full(len(same), same.shape[1])], axis=1)


def _share(rows: list[np.ndarray]) -> float:
    import numpy as np

    if not rows:
        return 0.0
    joined = np.concatenate(rows)
    return float(joined.mean() if joined.ndim == 1 else joined[:, 0].sum() / joined[:, 1].sum())
