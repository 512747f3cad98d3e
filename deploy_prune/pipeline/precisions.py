"""The models of a run in further precisions: each made from its proved fp32 file, proved against it, and judged."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.decoder_export import GRAPH
from deploy_prune import distributed
from deploy_prune.files import read_json, write_json
from deploy_prune.pipeline import making
from deploy_prune.pipeline.bundling import FACTS
from deploy_prune.pipeline.decoders import DECODER, place_decoder
from deploy_prune.pipeline.decoders import SAMPLES as DECODER_SAMPLES
from deploy_prune.pipeline.setup import Setup
from deploy_prune.pipeline.workspace import Stage, Workspace

if TYPE_CHECKING:
    import numpy as np

    from converters.precision import Limit
    from deploy_prune.release.manifest import Member


def precision_stages(
    workspace: Workspace, setup: Setup, models: Mapping[str, Stage], reference: np.ndarray | None
) -> dict[str, tuple[Stage, str]]:
    """`NAME.PRECISION` -> its stage and its twin's name, for every model and every precision the recipe asks for."""
    how = setup.recipe.precision
    files = {name: stage.directory / f"{name}.onnx" for name, stage in models.items()}
    keep = distributed.from_main(lambda: kept_in(files, how.keep)) if how.also else {}
    decoders = {name: stage.directory / DECODER / GRAPH for name, stage in models.items()} if how.keep_decoder else {}
    kept = distributed.from_main(lambda: kept_in(decoders, how.keep_decoder)) if decoders else {}
    done = {}
    for precision in how.also:
        for twin, stage in models.items():
            name = f"{twin}.{precision}"
            inputs = {
                "name": name,
                "twin": stage.fingerprint,
                "precision": {**how.model_dump(mode="json", exclude={"also"})},
                "quality": setup.recipe.quality.model_dump(mode="json"),
                "seed": setup.recipe.seed,
            }

            def work(directory: Path, name: str = name, precision: str = precision, twin: str = twin) -> None:
                facts = make_precision(setup, files[twin], directory, name, precision, reference, keep[twin])
                facts["decoder"] = lower_decoder(setup, files[twin].parent, directory, precision, kept.get(twin, ()))
                write_json(directory / FACTS, facts)

            done[name] = (workspace.stage(name, inputs, work), twin)
    return done


def kept_in(files: Mapping[str, Path], patterns: Sequence[str]) -> dict[str, list[str]]:
    """Of each model, the patterns that name nodes of its file: a layer that vanished from one member is in others.

    Raises UsageError for patterns that name a node of none.
    """
    from converters.precision.given import matched, matching, node_names

    names = {model: node_names(file) for model, file in files.items()} if patterns else {}
    matching(patterns, {name for own in names.values() for name in own})
    return {model: [pattern for pattern in patterns if matched(pattern, names[model])] for model in files}


def make_precision(
    setup: Setup,
    twin: Path,
    directory: Path,
    name: str,
    precision: Any,
    reference: np.ndarray | None = None,
    keep: Sequence[str] = (),
) -> dict[str, Any]:
    """Write `NAME.onnx`, its samples and scores into `directory`; returns the facts for the manifest. `keep` are names
    or patterns of the twin's nodes.

    Raises ParityError when the file is not its twin, UnsupportedModelError when values overflow.
    """
    from converters.precision import convert_precision
    from converters.precision.proof import asked_of
    from deploy_prune.release.samples import record_answers

    signature = setup.task.signature
    file, started = directory / f"{name}.onnx", time.monotonic()
    report = convert_precision(
        twin,
        file,
        precision,
        making.calibration_of(setup),
        made_up=_made_up(setup),
        keep=keep,
        mask=_mask(setup),
        **options_of(setup, precision),
    )
    converted = time.monotonic() - started
    answer = asked_of(file, precision)
    quality = making.judge(setup, file, directory, reference, predict=_predict(answer))
    record_answers(directory / making.SAMPLES, answer, signature, seed=setup.recipe.seed)
    found = report.to_json()
    return {
        "export": {"sha256": found.pop("sha256"), "bytes": found.pop("bytes"), "nodes": found.pop("nodes")},
        "parity": {**found.pop("parity"), **found},
        "quality": quality,
        "audit": _audit(setup, file, report.quantized),
        "seconds": {"convert": converted},
    }


def lower_decoder(
    setup: Setup, twin: Path, directory: Path, precision: Any, keep: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Convert the decoder with a cache in the stage directory `twin`, and let it answer the same tokens; None where
    there is none. `keep` are names or patterns of its nodes. Raises as `make_precision`.
    """
    from converters.precision.decoders import convert_decoder, replayed
    from deploy_prune.release.samples import Sample, load_samples, save_samples

    facts = read_json(twin / FACTS)["decoder"]
    if facts is None:
        return None
    source, target = twin / DECODER, directory / DECODER
    report = convert_decoder(
        source,
        target,
        precision,
        making.calibration_of(setup),
        keep=keep,
        **options_of(setup, precision),
    )
    answer = replayed(target / GRAPH, precision)
    asked = load_samples(twin / DECODER_SAMPLES)
    save_samples(directory / DECODER_SAMPLES, [Sample(each.inputs, answer(each.inputs)) for each in asked])
    found = report.to_json()
    changed = {"sha256": found.pop("sha256"), "bytes": found.pop("bytes"), "nodes": found.pop("nodes")}
    return {
        **facts,
        "export": {**facts["export"], **changed, "inputs": _cached_in(precision, facts["export"]["inputs"])},
        "outputs": _cached_in(precision, facts["outputs"]),
        "parity": {**found.pop("parity"), **found},
    }


def _cached_in(precision: str, tensors: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Inputs or outputs of a decoder, with its caches as they are in a precision; `verify` compares with the graph."""
    from converters.cache import is_cache
    from converters.precision.formats import DTYPES

    dtype = DTYPES.get(precision)
    return [{**tensor, "dtype": dtype} if dtype and is_cache(tensor["name"]) else dict(tensor) for tensor in tensors]


def place_precision(bundle: Path, name: str, stage: Stage, twin: Member, latency: list[Any], precision: str) -> Member:
    """Put what `make_precision` left into the bundle; returns the manifest's entry, which has the twin's costs."""
    from converters.precision import LIMITS
    from deploy_prune.release.bundle import place
    from deploy_prune.release.manifest import Member, QualityEntry, SamplesEntry

    facts = read_json(stage.directory / FACTS)
    scores = stage.directory / making.SCORES
    file = place(bundle, f"models/{name}.onnx", stage.directory / f"{name}.onnx", link=True)
    samples = place(bundle, f"samples/{name}.safetensors", stage.directory / making.SAMPLES, link=True)
    judged = scores.is_file()
    return Member(
        name=name,
        file=file,
        sha256=facts["export"]["sha256"],
        bytes=facts["export"]["bytes"],
        opset=twin.opset,
        variant=twin.variant,
        precision=precision,  # type: ignore[arg-type]
        twin=twin.name,
        weight_bytes=stored_weights(bundle / twin.file, bundle / file, precision),
        plan=twin.plan,
        asked=twin.asked,
        achieved=twin.achieved,
        quality=QualityEntry.model_validate(facts["quality"]) if facts["quality"] else None,
        scores=place(bundle, f"scores/{name}.safetensors", scores, link=True) if judged else None,
        parity=facts["parity"],
        decoder=place_decoder(bundle, name, stage.directory, facts["decoder"], LIMITS[precision].again),
        samples=SamplesEntry(file=samples, tolerance=LIMITS[precision].again),
        latency=latency,
        audit=facts["audit"],
        seconds=facts["seconds"],
    )


def stored_weights(twin: Path, file: Path, precision: str) -> int:
    """Bytes of the tensors in `file` that hold what the twin's stored floats hold, with their scales."""
    import math

    import onnx
    from onnx import helper

    from converters.precision.stored import held_as

    floats = [i for i in onnx.load(twin, load_external_data=False).graph.initializer if i.data_type == 1 and i.dims]
    names = {name for stored in floats for name in held_as(stored.name, precision)}
    total = 0
    for stored in onnx.load(file).graph.initializer:
        if stored.name in names:
            total += math.prod(stored.dims) * int(helper.tensor_dtype_to_np_dtype(stored.data_type).itemsize)
    return total


def options_of(setup: Setup, precision: str) -> dict[str, Any]:
    """Options of every conversion of the run to a precision."""
    how = setup.recipe.precision
    return {
        "overflow": how.overflow,
        "calibrate": how.calibrate,
        "percentile": how.percentile,
        "reduce_range": how.reduce_range,
        "rounding": how.rounding,
        "block": how.block,
        "agree": _agree(setup),
        "limit": limit_of(setup, precision),
    }


def limit_of(setup: Setup, precision: str) -> Limit:
    """The limits of a precision, as far as the recipe does not set its own."""
    from converters.precision import LIMITS, Limit

    how: Any = setup.recipe.precision
    own = LIMITS[precision]
    return Limit(how.tolerance.get(precision, own.error), how.agreement.get(precision, own.agreement), own.again)


def _made_up(setup: Setup) -> list[dict[str, np.ndarray]]:
    """Inputs of the sizes that parity is proved at."""
    from converters.parity import parity_sizes

    signature, seed = setup.task.signature, setup.recipe.seed
    found = [
        signature.random_inputs(size, seed=seed + i, padding=True) for i, size in enumerate(parity_sizes(signature))
    ]
    return [{name: value.numpy() for name, value in inputs.items()} for inputs in found]


def _agree(setup: Setup) -> Any:
    """Agreement as the task means it: classes, next tokens, or cosines of embeddings."""
    import torch

    from deploy_prune.tasks import Batch

    def agree(output: np.ndarray, reference: np.ndarray, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        batch = Batch({name: torch.from_numpy(value) for name, value in inputs.items()})
        return setup.task.agreement(torch.from_numpy(output), torch.from_numpy(reference), batch)

    return agree


def _mask(setup: Setup) -> str | None:
    """The input that marks which positions of an output per token count."""
    signature = setup.task.signature
    for spec in signature.inputs:
        if spec.role == "mask" and signature.output.shape[: len(spec.shape)] == spec.shape:
            return spec.name
    return None


def _predict(answer: Any) -> Any:
    return lambda inputs: answer({name: tensor.numpy() for name, tensor in inputs.items()})


def _audit(setup: Setup, file: Path, quantized: Sequence[str]) -> dict[str, Any] | None:
    """Whether every quantised layer became an integer kernel of ONNX Runtime's; None for half precisions, whose kernels
    the CPU provider does not have."""
    if not quantized:
        return None
    from bench.audit import INTEGER, judge_graph, layers_of, read_graph

    found = read_graph(file, layers_of(setup.sites))
    integer = sum(layer.ops.get(op, 0) for layer in found.layers for op in INTEGER)
    judged = judge_graph(found, found, {}, [])
    if integer < len(quantized):
        problem = f"{integer} integer kernels for {len(quantized)} quantised layers: the rest is computed in fp32"
        judged |= {"passed": False, "problems": [problem]}
    return judged
