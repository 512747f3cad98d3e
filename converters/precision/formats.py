"""Number formats a proved fp32 graph is shipped in, and how equal such a file must stay to its fp32 twin."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from deploy_prune.errors import UsageError, did_you_mean
from deploy_prune.precision_options import Precision

PRECISIONS: tuple[str, ...] = get_args(Precision)
DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
HALF = tuple(DTYPES)  # every activation is rounded; the others round the inputs and weights of linear layers alone
WEIGHT_ONLY = ("int8-weight-only", "int4-weight-only")


@dataclass(frozen=True)
class Limit:
    """How far a file may be off its fp32 twin: `error`, max|a − b| / max|a| over a batch of outputs; `agreement`, the
    least share of equal predictions (mean cosine, of embeddings); `again`, how far its own stored answers may be off
    on another machine, where sums in another order round other values."""

    error: float
    agreement: float
    again: float


# Errors: several times the largest seen on ViT-Tiny and DistilBERT, dense and cut (bench/notes.md, "Precision"); of
# weights alone, seen on SmolLM2: 0.07 in 8 bits, in 4 bits 0.52 dense and 0.61 cut, which is near its limit.
# Agreement: a judgement, not a measurement; ViT-Tiny in int8-static has about 0.90 and may pass, in int8-dynamic 0.875
# and may not. What limits so wide let pass, a weight stored wrong, is found value by value (stored.py).
LIMITS: dict[str, Limit] = {
    "fp16": Limit(0.02, 0.98, 0.01),
    "bf16": Limit(0.15, 0.95, 0.08),
    "int8-dynamic": Limit(0.6, 0.90, 0.05),
    "int8-static": Limit(0.6, 0.80, 0.05),
    "int8-weight-only": Limit(0.3, 0.90, 0.05),
    "int4-weight-only": Limit(0.8, 0.80, 0.05),
}

# Which formats each runtime of `bench` computes in. ONNX Runtime on the CPU runs fp16 files by casting to fp32 and
# back, and has no kernels for bf16; a time taken there would say nothing of the format.
RUNS: dict[str, tuple[str, ...]] = {
    "ort-cpu": ("fp32", "int8-dynamic", "int8-static", *WEIGHT_ONLY),
    "openvino": ("fp32", "int8-static"),
    "ort-cuda": ("fp32", "fp16", "bf16"),
    "ort-cuda-graph": ("fp32", "fp16", "bf16"),
    "ort-tensorrt": ("fp32", "fp16", "bf16"),
}


def runs(runtime: str, precision: str) -> bool:
    """Whether a runtime computes in this format; those that are not ONNX runtimes know fp32 alone."""
    return precision in RUNS.get(runtime, ("fp32",))


def steps_run(runtime: str, precision: str) -> bool:
    """Whether a decoder's steps can be timed: in runtimes of ONNX files alone, and not in bf16, which numpy has not, so
    that nobody can make up its caches."""
    return precision != "bf16" and precision in RUNS.get(runtime, ())


def check_steps(runtimes: Iterable[str]) -> None:
    """Raises UsageError for runtimes that run no ONNX files, and so no decoders with a cache."""
    if wrong := [name for name in runtimes if name not in RUNS]:
        raise UsageError(
            "decoders with a cache are ONNX files",
            expected=", ".join(RUNS),
            got=", ".join(wrong),
            remedy="Time them in another runtime, or leave the past out.",
        )


def check_timed(runtime: str, precision: str, steps: bool) -> None:
    """Raises UsageError for a runtime that does not compute in a precision, or cannot run decoders with a cache in it
    (`steps`)."""
    if steps:
        check_steps([runtime])
    if not (steps_run if steps else runs)(runtime, precision):
        known = [name for name in RUNS if (steps_run if steps else runs)(name, precision)]
        raise UsageError(
            f"{runtime} does not time {'decoders' if steps else 'models'} in {precision}",
            expected=", ".join(known) or "another precision",
            got=runtime,
            remedy="Time it in another runtime or precision.",
        )


def check_precision_name(name: str) -> str:
    """`name` when it is a format. Raises UsageError otherwise."""
    if name not in PRECISIONS:
        raise UsageError(f"no precision {name!r}", remedy=did_you_mean(name, PRECISIONS))
    return name
