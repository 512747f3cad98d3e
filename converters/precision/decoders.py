"""A decoder with its cache in another precision: directory to directory, proved in prefill and in steps.

In the half precisions the caches are in the format too, as inputs and outputs; token ids and logits stay as they were.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.cache import is_cache
from converters.decoder_export import GRAPH
from converters.decoder_parity import SCENES
from converters.generation import COUNTED, IDS, MASK, OnnxDecoder, answered, replay
from converters.onnx_session import OnnxSession
from converters.precision.convert import PrecisionReport, convert_precision
from converters.precision.emulate import Emulated
from converters.precision.formats import HALF, Precision, check_precision_name
from converters.precision.given import fp32_graph
from deploy_prune.errors import UsageError
from deploy_prune.files import atomic_dir, existing

if TYPE_CHECKING:
    import numpy as np

    from converters.precision.proof import Agree

CHUNKS = "chunks"  # beside ids and mask of a question: the pieces in which they are read
PROVED = 32  # tokens of a calibration text that are read in pieces
STEPS = 4


def convert_decoder(
    source: Path | str,
    target: Path | str,
    precision: Precision,
    calibration: Sequence[Mapping[str, np.ndarray]],
    *,
    agree: Agree | None = None,
    **options: Any,
) -> PrecisionReport:
    """Write the decoder in the directory `source`, as `export_decoder` wrote it in fp32, to the directory `target`.

    `calibration` are batches of `input_ids` and `attention_mask` (batch, tokens), both int64. Their beginnings are read
    by both files, as a prefill and a few single steps, and so are made-up tokens with padding. `agree` compares
    predictions of the tokens that are answered, whose mask it is given as `attention_mask`. `options` are those of
    `convert_precision`, which says what else is proved, and raises the same errors.
    """
    check_precision_name(precision)
    source, target = existing(source, "decoder"), Path(target)
    file = existing(source / GRAPH, "decoder")
    _check(calibration)
    fp32_graph(file)  # refuses what is not fp32, or has its weights beside it
    session = OnnxSession(file)
    caches = [name for name, _, _ in (*session.inputs, *session.outputs) if is_cache(name)]
    decoder = OnnxDecoder(file, session=session)
    vocabulary = int(session.outputs[0][2][2])
    batches = [{**texts, **decoder.empty(len(texts[IDS]))} for texts in calibration]
    with atomic_dir(target) as room:
        shutil.copytree(source, room, dirs_exist_ok=True, ignore=shutil.ignore_patterns(GRAPH))
        return convert_precision(
            file,
            room / GRAPH,
            precision,
            batches,
            caches=caches,
            questions=[_counted(decoder, question) for question in in_pieces(calibration)],
            made_up=[_counted(decoder, question) for question in padded(vocabulary, decoder.about.longest)],
            asked=replayed,
            mask=COUNTED,
            agree=None if agree is None else _of_answered(agree),
            where=f"{target.name}/{GRAPH}",
            **options,
        )


def replayed(path: Path | str, precision: str) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """What a decoder in a precision answers on this machine's CPU: logits of tokens that are read in pieces, each on
    the caches of the earlier. Half precisions are rounded as a GPU would round them."""
    made: list[OnnxDecoder] = []

    def answer(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        if not made:  # when first asked: loading fails where asking does
            made.append(OnnxDecoder(path, session=Emulated(path).session if precision in HALF else None))
        return replay(made[0], inputs[IDS], inputs[MASK], inputs[CHUNKS].tolist())

    return answer


def _of_answered(agree: Agree) -> Agree:
    return lambda output, reference, inputs: agree(output, reference, {**inputs, MASK: inputs[COUNTED]})


def _counted(decoder: OnnxDecoder, question: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A question with the mask of the tokens that are answered."""
    return {**question, COUNTED: question[MASK][:, answered(decoder, question[CHUNKS].tolist())]}


def in_pieces(calibration: Sequence[Mapping[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """The first tokens of every batch: a prefill, and steps of one token."""
    import numpy as np

    for texts in calibration:
        length = min(PROVED, texts[IDS].shape[1])
        steps = min(STEPS, length - 1)
        chunks = [length - steps] + [1] * steps
        yield {IDS: texts[IDS][:, :length], MASK: texts[MASK][:, :length], CHUNKS: np.array(chunks, np.int64)}


def padded(vocabulary: int, longest: int | None, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Made-up tokens, padded on the left, in the pieces in which fp32 decoders are proved."""
    import numpy as np

    generator = np.random.default_rng(seed)
    for pads, chunks in SCENES:
        length = sum(chunks)
        if longest is None or length <= longest:
            mask = (np.arange(length) >= np.array(pads)[:, None]).astype(np.int64)
            ids = generator.integers(0, vocabulary, mask.shape)
            yield {IDS: ids, MASK: mask, CHUNKS: np.array(chunks, np.int64)}


def _check(calibration: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Raise UsageError for texts that are not `input_ids` and `attention_mask` alone."""
    for number, texts in enumerate(calibration):
        if sorted(texts) != sorted((IDS, MASK)):
            raise UsageError(
                "a decoder is calibrated on texts",
                where=f"calibration batch {number}",
                expected=f"{IDS} and {MASK}",
                got=", ".join(sorted(texts)),
            )
