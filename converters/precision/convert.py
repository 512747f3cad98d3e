"""From a proved fp32 file to one in another precision, proved against it; nothing is written when the proof fails."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from converters.precision.blocks import BLOCK, BLOCKS
from converters.precision.formats import HALF, Limit, Precision, check_precision_name
from converters.precision.given import check_batches, check_option, fp32_graph
from converters.precision.int8 import Calibrate
from converters.precision.integers import to_integers
from converters.precision.proof import Asked, PrecisionParity, asked_of, prove
from converters.precision.weight_only import Rounding
from deploy_prune.errors import UnsupportedModelError, UsageError
from deploy_prune.files import atomic_file, existing, sha256_file

if TYPE_CHECKING:
    import numpy as np

    from converters.precision.half import Lowered
    from converters.precision.proof import Agree

Overflow = Literal["refuse", "keep"]


@dataclass(frozen=True)
class PrecisionReport:
    """What was written. `kept`: node -> why it stayed in fp32. `largest`: of the values that a half precision rounds,
    the name and magnitude of the largest on the calibration data. `fills`: stored mask fills moved into the range."""

    precision: str
    sha256: str
    bytes: int
    nodes: int
    parity: PrecisionParity
    kept: dict[str, str] = field(default_factory=dict)
    quantized: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    fills: tuple[str, ...] = ()
    largest: tuple[str, float] | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "parity": self.parity.to_json()}


def convert_precision(
    source: Path | str,
    target: Path | str,
    precision: Precision,
    calibration: Iterable[Mapping[str, np.ndarray]],
    *,
    made_up: Iterable[Mapping[str, np.ndarray]] = (),
    keep: Sequence[str] = (),
    overflow: Overflow = "refuse",
    calibrate: Calibrate = "minmax",
    percentile: float = 99.999,
    reduce_range: bool = False,
    rounding: Rounding = "compensated",
    block: int = BLOCK,
    agree: Agree | None = None,
    mask: str | None = None,
    limit: Limit | None = None,
    caches: Collection[str] = (),
    questions: Sequence[Mapping[str, np.ndarray]] | None = None,
    asked: Asked = asked_of,
    where: str | None = None,
) -> PrecisionReport:
    """Write the fp32 ONNX file `source` in another precision to `target`, and prove the two equal (see `prove`).

    `calibration` are batches of real inputs: int8-static takes its ranges from them, int4-weight-only what it rounds
    weights for (`rounding`), the half precisions are checked for overflow on them, and predictions are compared on
    them. In the weight-only forms a `block` of weights shares a scale. `keep` are names or patterns of nodes that stay
    in fp32; with `overflow="keep"` so do those around values too large for the format, which are refused otherwise.
    `caches` are inputs and outputs of the graph that a half precision has in its format, and that may be empty. A graph
    that is not asked in one call comes with how it is (`asked`), and the `questions` that take the place of
    `calibration` then. `where` names it in errors.
    Raises UnsupportedModelError (overflow, nothing to convert), ParityError when the file is not its twin, UsageError,
    ArtifactError for a damaged `source`.
    """
    start = time.perf_counter()
    check_precision_name(precision)
    check_option("overflow", overflow, get_args(Overflow))
    check_option("calibrate", calibrate, get_args(Calibrate))
    check_option("rounding", rounding, get_args(Rounding))
    if type(block) is not int or block not in BLOCKS:
        raise UsageError("no such block", expected=f"one of {', '.join(map(str, BLOCKS))} weights", got=str(block))
    if not 50 < percentile <= 100:
        raise UsageError("no such percentile", expected="above 50, at most 100", got=str(percentile))
    if isinstance(keep, str):
        raise UsageError("keep is one text", expected="a list of names or patterns of nodes", got=repr(keep))
    source, target = existing(source, "ONNX file"), Path(target)
    batches = list(calibration)
    check_batches(fp32_graph(source), batches, mask if questions is None else None, caches)
    with atomic_file(target) as temporary:
        if precision in HALF:
            facts = _lowered(source, temporary, precision, batches, keep, overflow, caches)
        else:
            made = to_integers(
                source,
                temporary,
                precision,
                batches,
                keep=keep,
                calibrate=calibrate,
                percentile=percentile,
                reduce_range=reduce_range,
                rounding=rounding,
                block=block,
            )
            facts = {"quantized": made.nodes, "tables": made.tables, "kept": dict.fromkeys(made.kept, "asked for")}
        nodes = _sign(temporary, precision)
        parity = prove(
            source,
            temporary,
            precision,
            batches if questions is None else questions,
            made_up=made_up,
            agree=agree,
            mask=mask,
            limit=limit,
            where=where or target.name,
            asked=asked,
        )
    return PrecisionReport(
        precision,
        sha256_file(target),
        target.stat().st_size,
        nodes,
        parity,
        seconds=time.perf_counter() - start,
        **facts,
    )


def _lowered(
    source: Path,
    target: Path,
    precision: str,
    batches: Sequence[Mapping[str, np.ndarray]],
    keep: Sequence[str],
    overflow: Overflow,
    narrow: Collection[str],
) -> dict[str, Any]:
    """Write a half-precision file whose values all fit; returns the report's facts of it."""
    import onnx
    import onnx_ir as ir

    from converters.precision.half import LARGEST, filled, lower
    from converters.precision.ranges import around, magnitudes, overflowing, refuse_caches, refuse_overflow

    fp32 = onnx.load(source)

    def attempt(names: Sequence[str]) -> tuple[ir.Model, Lowered]:
        model = ir.load(source)  # anew: a graph shares its tensors with what it was read from
        lowered = lower(model, precision, names, narrow)
        if not lowered.rounded:
            raise UnsupportedModelError(
                f"no node is left to compute in {precision}", where=str(source), remedy="Keep fewer nodes in fp32."
            )
        return model, lowered

    model, found = attempt(keep)
    for stored in fp32.graph.initializer:
        if stored.name in found.fills:  # what is asked is how large all else becomes
            values = filled(onnx.numpy_helper.to_array(stored), LARGEST[precision], 0.0)
            stored.CopyFrom(onnx.numpy_helper.from_array(values, stored.name))
    largest = magnitudes(fp32, source, found.rounded, batches)
    reasons: dict[str, str] = {}
    if beyond := overflowing(largest, LARGEST[precision]):
        refuse_caches({name: value for name, value in beyond.items() if name in narrow}, source, precision)
        if overflow == "refuse":
            refuse_overflow(fp32, source, beyond, precision, LARGEST[precision])
        for value, names in around(fp32, beyond).items():
            reasons |= dict.fromkeys(names, f"{value} reaches {beyond[value]:.4g}")
        model, found = attempt([*keep, *(_literal(name) for name in reasons)])
        rest = {value: beyond[value] for value in beyond if value in found.rounded}
        refuse_overflow(fp32, source, rest, precision, LARGEST[precision])  # an input or output of the graph
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    target.write_bytes(proto.SerializeToString(deterministic=True))
    fitting = {name: largest[name] for name in found.rounded}
    top = max(fitting, key=lambda name: fitting[name], default=None)
    return {
        "kept": {name: reasons.get(name, why) for name, why in found.kept.items()},
        "fills": tuple(found.fills),
        "largest": (top, fitting[top]) if top is not None else None,
    }


def _literal(name: str) -> str:
    """A node's name as a pattern that matches it alone."""
    import glob

    return glob.escape(name)


def _sign(path: Path, precision: str) -> int:
    """Note the precision in the file's metadata; returns how many nodes the graph has."""
    import onnx

    model = onnx.load(path)
    properties = {p.key: p.value for p in model.metadata_props} | {"deploy_prune.precision": precision}
    del model.metadata_props[:]
    for key in sorted(properties):
        model.metadata_props.add(key=key, value=properties[key])
    path.write_bytes(model.SerializeToString(deterministic=True))
    return len(model.graph.node)
