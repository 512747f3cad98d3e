"""Parity: forms of one model that must compute the same, proved at sizes nobody traced. A difference stops the run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.comparison import Difference, compare
from deploy_prune.errors import ArtifactError, ParityError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from deploy_prune.signature import Signature

    # A model (its output is signature.call), an ONNX file, or a function of the named inputs.
    Form = nn.Module | Path | str | Callable[[Mapping[str, Tensor]], Tensor]

# Largest relative error between fp32 forms. Rounding alone (none of it in float64) made at most 2e-6 on ViT-Tiny and,
# on SmolLM2-135M cut at random (30 layers), 3e-5 between masked and compact and 6e-5 between compact and ONNX, where
# torch itself is 2e-5 off its float64 self. The mildest fault tried, two neurons swapped in one layer, makes 8e-4.
TOLERANCE = 2e-4

_CAUSES = {
    "shape": "a stale head count or width attribute, or an output that is not the signature's",
    "nan": "a weight that is NaN or infinite, or a row of the mask without anything to attend to",
    "torch": "heads cut in another order than planned, a stale head count, a wrong attention scale, or other weights",
    "onnx": "a damaged weight in the file, a dimension frozen by tracing, or a runtime optimisation that is wrong here",
}


@dataclass(frozen=True)
class Check:
    """One pair at one size: `error` is max|a − b| / max|a| over the batch, `agreement` the share of equal argmax."""

    sizes: dict[str, int]
    error: float
    agreement: float


@dataclass(frozen=True)
class Pair:
    """Two forms compared: {"reference": "compact", "candidate": "onnx"}; `error` is the worst of its checks."""

    reference: str
    candidate: str
    tolerance: float
    error: float
    agreement: float
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class ParityReport:
    """Evidence that the forms agree; made only when they do."""

    pairs: tuple[Pair, ...]
    seed: int

    @property
    def error(self) -> float:
        return max(pair.error for pair in self.pairs)

    def to_json(self) -> dict[str, Any]:
        return {"seed": self.seed, "error": self.error, "pairs": [asdict(pair) for pair in self.pairs]}


def parity_sizes(
    signature: Signature, trace_sizes: Mapping[str, int] | None = None, *, longest: int | None = None
) -> list[dict[str, int]]:
    """Sizes off the trace: batch 1 and 3 (5 where 3 was traced), sequences of 1, odd length and `longest`.

    `longest` is the longest sequence the model takes, 48 when not known.
    """
    from converters.onnx_export import EXAMPLE_SIZES

    traced = {**EXAMPLE_SIZES, **(trace_sizes or {})}
    wide = 3 if traced["batch"] != 3 else 5
    if "sequence" not in signature.dynamic:
        return [{"batch": 1}, {"batch": wide}]
    longest = min(longest or 48, 128)  # costs grow with its square; longer ones differ in no code path
    middle = next(n for n in (7, 9) if n != traced["sequence"])
    return [{"batch": b, "sequence": min(s, longest)} for b, s in ((1, 1), (wide, middle), (1, 17), (wide, longest))]


def check_parity(
    forms: Mapping[str, Form],
    signature: Signature,
    *,
    sizes: Sequence[Mapping[str, int]] | None = None,
    examples: Sequence[Mapping[str, Tensor]] = (),
    seed: int = 0,
    tolerance: float = TOLERANCE,
    same_weights: bool = True,
) -> ParityReport:
    """Compare each form with the one before it: {"masked": f, "compact": model, "onnx": path}.

    Inputs are made up at the given `sizes` (default `parity_sizes`), right-padded where the signature has a mask, and
    the real `examples` are added. Where the output has a position per token, only unpadded positions count.
    An ONNX file after a model must also hold the model's weights, bit for bit, unless `same_weights` is False: a single
    wrong weight may hide below any tolerance of outputs. Raises
    ParityError listing every pair and size that differs, cannot be computed, or is not finite.
    """
    if len(forms) < 2:
        raise UsageError("parity needs at least two forms", got=", ".join(forms))
    batches = list(_batches(signature, sizes or parity_sizes(signature), examples, seed))
    names = list(forms)
    outputs = {name: _outputs(form, signature, [inputs for _, inputs in batches]) for name, form in forms.items()}
    pairs, problems, causes = [], [], set()
    for first, second in itertools.pairwise(names):
        onnx = any(isinstance(forms[name], str | Path) for name in (first, second))
        checks = []
        if same_weights and (faults := weight_faults(forms[first], forms[second])):
            problems += [f"{first} -> {second}: {fault}" for fault in faults]
            causes.add("onnx")
        for (size, inputs), a, b in zip(batches, outputs[first], outputs[second], strict=True):
            if isinstance(a, str) or isinstance(b, str):
                broken = first if isinstance(a, str) else second
                problems.append(f"{first} -> {second} at {_named(size)}: {broken} fails: {a if broken == first else b}")
                causes.add("shape")
                continue
            difference = compare(a, b, tolerance=tolerance, valid=_valid(signature, inputs))
            checks.append(Check(dict(size), difference.error, difference.agreement))
            if difference.error > tolerance:
                problems.append(f"{first} -> {second} at {_named(size)}: " + _words(difference, tolerance))
                causes.add(_cause(difference, onnx))
        pairs.append(
            Pair(
                first,
                second,
                tolerance,
                max((c.error for c in checks), default=0.0),
                min((c.agreement for c in checks), default=0.0),
                tuple(checks),
            )
        )
    if problems:
        raise ParityError(
            "forms of the model that must be equal differ",
            problems=problems,
            remedy="Likely: " + "; or ".join(_CAUSES[c] for c in _CAUSES if c in causes) + ".",
        )
    return ParityReport(tuple(pairs), seed)


def _batches(
    signature: Signature, sizes: Sequence[Mapping[str, int]], examples: Sequence[Mapping[str, Tensor]], seed: int
) -> Iterator[tuple[dict[str, int], Mapping[str, Tensor]]]:
    for i, size in enumerate(sizes):
        yield dict(size), signature.random_inputs(size, seed=seed + i, padding=True)
    for inputs in examples:
        size = {
            d: inputs[spec.name].shape[i]
            for spec in signature.inputs
            for i, d in enumerate(spec.shape)
            if isinstance(d, str)
        }
        yield size, inputs


def _outputs(form: Form, signature: Signature, batches: Sequence[Mapping[str, Tensor]]) -> list[np.ndarray | str]:
    """The form's output for each batch, or in words why there is none."""
    import torch

    from converters.onnx_session import OnnxSession

    function: Callable[[Mapping[str, Tensor]], Any]
    if isinstance(form, str | Path):
        session = OnnxSession(form)

        def function(inputs: Mapping[str, Tensor]) -> Any:
            return session.run({name: value.cpu().numpy() for name, value in inputs.items()})
    elif isinstance(form, torch.nn.Module):
        device = next(form.parameters()).device

        def function(inputs: Mapping[str, Tensor]) -> Any:
            return signature.call(form, {name: value.to(device) for name, value in inputs.items()})
    else:
        function = form
    results: list[np.ndarray | str] = []
    for inputs in batches:
        try:
            with torch.no_grad():
                output = function(inputs)
        except (RuntimeError, ValueError, IndexError, TypeError, ArtifactError) as error:
            lines = (error.got or error.what) if isinstance(error, ArtifactError) else str(error)
            results.append(f"{type(error).__name__}: {lines.strip()[:200]}")
            continue
        results.append(output.detach().float().cpu().numpy() if isinstance(output, torch.Tensor) else output)
    return results


def weight_faults(form: Form, other: Form) -> list[str]:
    """Weights that an ONNX file holds otherwise than the model before it, in words."""
    import numpy as np
    import torch

    if not (isinstance(form, torch.nn.Module) and isinstance(other, str | Path)):
        return []
    import onnx
    from onnx import numpy_helper

    from converters.passes.stored import assemble, parts_of

    values = {name: p.detach().cpu().numpy() for name, p in form.named_parameters()}
    faults = []
    for stored in onnx.load(other).graph.initializer:
        if not all(part.parameter in values for part in parts_of(stored.name)):
            continue
        got, want = numpy_helper.to_array(stored), assemble(stored.name, values)
        if got.shape != want.shape:
            faults.append(f"{stored.name} has shape {got.shape} in the file, {want.shape} in the model")
        elif not np.array_equal(got.view(np.uint8), np.ascontiguousarray(want).view(np.uint8)):
            faults.append(f"{stored.name} differs in {int((got != want).sum())} of {want.size} values")
    return faults


def _valid(signature: Signature, inputs: Mapping[str, Tensor]) -> np.ndarray | None:
    """The attention mask, when the output has a position for each of its entries."""
    for spec in signature.inputs:
        if spec.role == "mask" and signature.output.shape[: len(spec.shape)] == spec.shape:
            mask: np.ndarray = inputs[spec.name].cpu().numpy()
            return mask
    return None


def _named(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _words(difference: Difference, tolerance: float) -> str:
    text = difference.fault or f"error {difference.error:.2e}, tolerance {tolerance:.0e}"
    if difference.index is not None and difference.values is not None:
        a, b = difference.values
        text += f"; first at output[{', '.join(map(str, difference.index))}]: {a:.6g} and {b:.6g}"
    return text + ("" if difference.fault else f"; argmax agrees on {difference.agreement:.0%}")


def _cause(difference: Difference, onnx: bool) -> str:
    if difference.fault is not None:
        return "shape" if difference.fault.startswith("shape") else "nan"
    return "onnx" if onnx else "torch"
