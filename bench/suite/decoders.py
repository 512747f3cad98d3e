"""Decoders with their key/value cache on the device: what they compute and write, and how fast they write."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.suite.base import ERROR, Bench, all_well, close
from bench.suite.files import OPSET
from bench.suite.models import half_of, subjects
from deploy_prune.errors import DeployPruneError, ParityError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from converters.generation import OnnxDecoder

MODEL = "smollm2-135m"
FORMS = ("dense", "half")
PROMPT = 16
CHUNKS = (9, 1, 1, 5)  # of the prompt, each read on the cache of the earlier


def decoders(bench: Bench) -> dict[str, Any]:
    """The dense decoder and its half, in every precision, read a text in pieces as torch reads it whole, and each token
    that they write is the likeliest by torch, up to rounding. Tokens a second are of greedy decoding at batch 1."""
    import numpy as np

    from converters.decoder_parity import whole_logits
    from converters.generation import OnnxDecoder, generate, replay

    subject, dense, half = bench.subject(MODEL)
    models: dict[str, nn.Module] = {"dense": dense, "half": half.model}
    tokens = 16 if bench.small else 128
    result, failed = bench.begin(), []
    for name, precision in ((name, precision) for name in FORMS for precision in precisions(bench.small)):
        model = models[name]
        what, rounding = f"{name}, {precision}", "tf32" if precision == "fp32" else precision
        try:
            decoder = OnnxDecoder(bench.jobs["decoder", name][precision], device=bench.device)
            prompt = subject.signature.random_inputs({"batch": 1, "sequence": PROMPT}, seed=5)["input_ids"].numpy()
            mask = np.ones_like(prompt)
            expected = whole_logits(model, *_tensors(prompt, mask))
            off = close(replay(decoder, prompt, mask, CHUNKS), expected, rounding, what)
            seconds, written = _timed(decoder, generate, prompt[0].tolist(), tokens)
            result[what] = {
                "logits off by": off,
                "written off by": likely(model, [*prompt[0].tolist(), *written], tokens, 2 * ERROR[rounding]),
                "tokens": tokens,
                "tokens a second": tokens / seconds,
            }
        except DeployPruneError as failure:
            result[what] = {"failed": str(failure)}
            failed.append(what)
    all_well(failed)
    return result


def precisions(small: bool) -> tuple[str, ...]:
    return ("fp32", "fp16") if small else ("fp32", "fp16", "bf16")  # the CPU has no kernels for the last


def export_ahead(bench: Bench) -> None:
    for name in FORMS:
        bench.jobs.start(("decoder", name), export, bench.small, bench.align, name, bench.directory)


def export(small: bool, align: int, form: str, directory: Path) -> dict[str, Path]:
    """The ONNX file of the dense decoder or of its half, in every precision."""
    from converters.decoder_export import export_decoder
    from converters.precision import LIMITS
    from converters.precision.decoders import convert_decoder

    subject = next(subject for subject in subjects(small) if subject.name == MODEL)
    model = subject.build()
    if form == "half":
        model = half_of(model, subject.signature, align).model
    folder = directory / "decoders"
    folder.mkdir(exist_ok=True)
    files = {precision: folder / f"{form}.{precision}" for precision in precisions(small)}
    export_decoder(model, files["fp32"], opset=OPSET, variant="ort")
    inputs = subject.signature.random_inputs({"batch": 1, "sequence": PROMPT}, seed=6)
    texts = [{name: tensor.numpy() for name, tensor in inputs.items()}]
    for precision in precisions(small)[1:]:
        limit = replace(LIMITS[precision], agreement=0.0)  # random weights are never sure
        convert_decoder(files["fp32"], files[precision], precision, texts, limit=limit)  # type: ignore[arg-type]
    return {precision: file / "model.onnx" for precision, file in files.items()}


def _timed(decoder: OnnxDecoder, generate: Any, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
    """Seconds of the fastest of three runs after one that warms up, and what it wrote."""
    made = generate(decoder, [prompt], tokens, stop=())
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        made = generate(decoder, [prompt], tokens, stop=())
        best = min(best, time.perf_counter() - began)
    return best, made[0]


def likely(model: nn.Module, text: list[int], tokens: int, rounding: float) -> float:
    """How far below torch's likeliest token the written ones lie at most, as a share of the largest logit. Raises
    ParityError where that is more than `rounding`."""
    import numpy as np

    from converters.decoder_parity import whole_logits

    ids = np.array([text], np.int64)
    logits = whole_logits(model, *_tensors(ids, np.ones_like(ids)))[0, len(text) - tokens - 1 : -1]
    chosen = np.take_along_axis(logits, ids[0, -tokens:, None], axis=1)[:, 0]
    below = float((logits.max(1) - chosen).max() / np.abs(logits).max())
    if not below <= rounding:
        raise ParityError("a decoder writes other tokens than torch", expected=f"{rounding:g}", got=f"{below:.2e}")
    return below


def _tensors(*arrays: np.ndarray) -> list[Any]:
    import torch

    return [torch.from_numpy(array) for array in arrays]
