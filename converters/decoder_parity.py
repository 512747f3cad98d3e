"""A decoder with a cache is proved: prompts in one piece, token by token and in uneven pieces, padded on the left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.cache import positions
from converters.comparison import compare
from converters.generation import COUNTED, OnnxDecoder, answered, replay
from converters.parity import TOLERANCE, Check, weight_faults
from deploy_prune.errors import ArtifactError, ParityError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

# (padding on the left of each row, sizes of the pieces): one token alone; decoding from the first token; a prefill with
# steps after it; and pieces of several tokens, as speculative decoding and chunked prefill make them.
SCENES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((0,), (1,)),
    ((0,), (1, 1, 1, 1)),
    ((0, 3, 6), (8, 1, 1, 1)),
    ((2, 0), (5, 3, 1, 4)),
)


@dataclass(frozen=True)
class DecoderParity:
    """Evidence that an ONNX decoder gives torch's logits however the tokens are fed; made only when it does."""

    tolerance: float
    error: float
    checks: tuple[Check, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_decoder(
    model: nn.Module,
    file: Path | str,
    *,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    examples: Sequence[Mapping[str, Tensor]] = (),
) -> DecoderParity:
    """Compare the ONNX decoder `file` with what `model` computes of whole texts without any cache.

    Made-up tokens are fed as SCENES says; of the real `examples` (input_ids, attention_mask) the first tokens, as a
    prefill and four steps. The file must hold the model's weights bit for bit. Raises ParityError with every
    difference.
    """
    import torch

    problems = [f"torch -> onnx: {fault}" for fault in weight_faults(model, file)]
    decoder, checks = OnnxDecoder(file), []
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    scenes = [
        (torch.randint(0, vocabulary, (len(pads), sum(chunks)), generator=generator), _mask(pads, sum(chunks)), chunks)
        for pads, chunks in _fitting(decoder.about.longest)
    ]
    for example in examples:
        length = min(24, int(example["attention_mask"].sum(-1).min()))
        if length > 4:
            ids = example["input_ids"][:, :length]
            scenes.append((ids, torch.ones_like(ids), (length - 4, 1, 1, 1, 1)))
    for ids, mask, chunks in scenes:
        sizes = {"batch": ids.shape[0], "tokens": ids.shape[1], "pieces": len(chunks)}
        try:
            got = replay(decoder, ids.numpy(), mask.numpy(), chunks)
        except ArtifactError as error:
            problems.append(f"torch -> onnx at pieces {chunks}: {error.got}")
            continue
        told = answered(decoder, chunks)
        expected = whole_logits(model, ids, mask)[:, told]
        difference = compare(expected, got, tolerance=tolerance, valid=mask.numpy()[:, told])
        checks.append(Check(sizes, difference.error, difference.agreement))
        if difference.error > tolerance:
            fault = difference.fault or f"error {difference.error:.2e}, tolerance {tolerance:.0e}"
            place = ", ".join(map(str, difference.index or ()))
            problems.append(f"torch -> onnx at pieces {chunks}: {fault}; first at logits[{place}]")
    if problems:
        raise ParityError(
            "the decoder with a cache is not the model",
            where=str(file),
            problems=problems,
            remedy="Likely: a damaged weight, caches in another order, or positions that padding moved.",
        )
    return DecoderParity(tolerance, max(check.error for check in checks), tuple(checks))


def whole_logits(model: nn.Module, ids: Tensor, mask: Tensor) -> np.ndarray:
    """What torch computes of whole, left-padded texts without a cache: (batch, tokens, vocabulary)."""
    import torch

    device = next(model.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask, ids.shape[1]), use_cache=False)
    logits: np.ndarray = output.logits.float().cpu().numpy()
    return logits


def record_decoder_samples(path: Path | str, model: nn.Module, decoder: OnnxDecoder, *, seed: int = 0) -> None:
    """Store tokens, how they are fed, and torch's logits of those that `decoder` answers, as `release.samples` reads
    them: `0/input/chunks`, ..."""
    import numpy as np
    import torch
    from safetensors.numpy import save_file

    from deploy_prune.files import atomic_file

    pads, chunks = (0, 2), (4, 1, 2)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    ids = torch.randint(0, vocabulary, (len(pads), sum(chunks)), generator=generator)
    mask = _mask(pads, sum(chunks))
    told = answered(decoder, chunks)
    stored = {
        "0/input/input_ids": ids.numpy(),
        "0/input/attention_mask": mask.numpy(),
        "0/input/chunks": torch.tensor(chunks).numpy(),
        f"0/input/{COUNTED}": np.ascontiguousarray(mask.numpy()[:, told]),
        "0/output": np.ascontiguousarray(whole_logits(model, ids, mask)[:, told]),
    }
    with atomic_file(path) as temporary:
        save_file(stored, temporary)


def _mask(pads: Sequence[int], length: int) -> Tensor:
    import torch

    return (torch.arange(length)[None, :] >= torch.tensor(pads)[:, None]).long()


def _fitting(longest: int | None) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [scene for scene in SCENES if longest is None or sum(scene[1]) <= longest]
