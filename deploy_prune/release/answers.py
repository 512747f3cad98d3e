"""Asking a model its stored questions again, in any runtime, and comparing the answers. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploy_prune.errors import ArtifactError
from deploy_prune.release.manifest import Manifest, Member, SamplesEntry
from deploy_prune.release.samples import load_samples

if TYPE_CHECKING:
    import numpy as np

Asker = Callable[[Path], Callable[[Mapping[str, "np.ndarray"]], "np.ndarray"]]
"""From an ONNX file to a function from its inputs to its output."""

PLAIN = "onnxruntime"


@dataclass(frozen=True)
class MemberCheck:
    """One model asked its stored samples: `error` relative to the largest output, `agreement` of argmax."""

    name: str
    samples: int
    error: float
    tolerance: float
    agreement: float
    runtime: str = PLAIN


def askers(runtimes: Sequence[str]) -> dict[str, Asker]:
    """How to ask each of the runtimes of `bench`; onnxruntime on the CPU when none is named.

    Raises UsageError for an unknown runtime, UnavailableError for one that does not work here.
    """
    if not runtimes:
        return {PLAIN: _plain}
    from bench.runtimes import get_runtime

    def of(name: str) -> Asker:
        runtime = get_runtime(name)

        def load(file: Path) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
            session = runtime.load(file)
            return lambda inputs: session.run(inputs)[0]

        return load

    return {name: of(name) for name in dict.fromkeys(runtimes)}


def _plain(file: Path) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    from converters.onnx_session import OnnxSession

    return OnnxSession(file).run


def ask(bundle: Path, manifest: Manifest, member: Member, runtime: str, asker: Asker) -> tuple[MemberCheck, list[str]]:
    """Run the stored inputs; differences come back in words. A precision that the runtime does not compute in is asked
    of onnxruntime on the CPU, with half precisions rounded as a GPU rounds them; the figure says so."""
    from converters.precision.formats import HALF, runs
    from converters.precision.proof import asked_of

    if runs("ort-cpu" if runtime == PLAIN else runtime, member.precision):
        answer = asker(bundle / member.file)
    else:
        answer = asked_of(bundle / member.file, member.precision)
        runtime = f"{PLAIN}, {member.precision} emulated" if member.precision in HALF else PLAIN
    return compared(
        bundle, member.name, member.samples, answer, lambda inputs: _valid(manifest, inputs), runtime=runtime
    )


def compared(
    bundle: Path,
    name: str,
    entry: SamplesEntry,
    answer: Callable[[Mapping[str, np.ndarray]], np.ndarray],
    valid: Callable[[Mapping[str, np.ndarray]], np.ndarray | None],
    *,
    runtime: str = PLAIN,
) -> tuple[MemberCheck, list[str]]:
    """As `ask`, of any `answer` to the stored inputs; `valid` gives of the inputs which positions count."""
    from converters.comparison import compare

    tolerance, worst, agreement, text = entry.tolerance, 0.0, 1.0, []
    samples = load_samples(bundle / entry.file)
    for i, sample in enumerate(samples):
        try:
            output = answer(sample.inputs)
        except ArtifactError as error:
            text.append(f"sample {i}: {error.got}")
            worst = float("inf")
            continue
        difference = compare(sample.output, output, tolerance=tolerance, valid=valid(sample.inputs))
        worst, agreement = max(worst, difference.error), min(agreement, difference.agreement)
        if difference.error > tolerance:
            fault = difference.fault or f"error {difference.error:.2e}, tolerance {tolerance:.0e}"
            text.append(f"sample {i}: {fault}, first at output{list(difference.index or ())}")
    return MemberCheck(name, len(samples), worst, tolerance, agreement, runtime), text


def _valid(manifest: Manifest, inputs: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The stored attention mask, when the output has a position for each of its entries."""
    for entry in manifest.inputs:
        if entry.role == "mask" and manifest.output.shape[: len(entry.shape)] == entry.shape:
            return inputs.get(entry.name)
    return None
