"""Greedy generation from an ONNX decoder with onnxruntime and numpy alone: no torch, no transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.onnx_session import Device, OnnxSession
from deploy_prune.errors import ArtifactError, UnavailableError, UsageError
from deploy_prune.files import existing_file

if TYPE_CHECKING:
    import numpy as np

METADATA = "deploy_prune.decoder"  # the property of an ONNX file that holds the JSON of `About`
IDS, MASK, LOGITS = "input_ids", "attention_mask", "logits"
COUNTED = "counted"  # of stored questions: the mask of the tokens that are answered
_ELEMENTS = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}  # as numbered by ONNX


@dataclass(frozen=True)
class About:
    """What generation must know and the graph does not say: the tokens that end a text, and how long one may be."""

    stop: tuple[int, ...] = ()
    longest: int | None = None

    def to_json(self) -> str:
        return json.dumps({"stop": list(self.stop), "longest": self.longest}, sort_keys=True)


class OnnxDecoder:
    """A file that `export_decoder` wrote: it reads new tokens on the caches that it gave back for the earlier ones."""

    def __init__(
        self,
        path: Path | str,
        *,
        threads: int | None = None,
        device: Device = "cpu",
        session: OnnxSession | None = None,
    ) -> None:
        """Caches stay on `device`, or where a `session` of the file that is given has them. Raises UnavailableError
        without onnxruntime, file or device, ArtifactError when the file is no decoder."""
        self._session = session or _loaded(path, threads, device)
        names = [name for name, _, _ in self._session.inputs]
        said = self._session.metadata.get(METADATA)
        if names[:2] != [IDS, MASK] or said is None:
            raise ArtifactError(
                "not a decoder with a key/value cache",
                where=str(path),
                expected=f"inputs {IDS}, {MASK} and past caches, and the property {METADATA}",
                got=", ".join(names[:4]),
                remedy="Export one: a recipe with export.cache: true, or converters.decoder_export.export_decoder.",
            )
        told = json.loads(said)
        self.about = About(tuple(told["stop"]), told["longest"])
        self._caches = {  # name -> (heads, width, element type)
            name: (int(shape[1]), int(shape[3]), _ELEMENTS[kind]) for name, kind, shape in self._session.inputs[2:]
        }
        self.last_logits = self._session.outputs[0][2][1] == 1
        self._next = {f"present.{name.partition('.')[2]}": name for name in self._caches}

    def empty(self, batch: int) -> dict[str, np.ndarray]:
        """Caches (batch, heads, 0, width) of no token, in fp32."""
        import numpy as np

        return {
            name: np.zeros((batch, heads, 0, width), np.float32) for name, (heads, width, _) in self._caches.items()
        }

    def read(
        self, ids: np.ndarray, mask: np.ndarray, past: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Logits (batch, new, vocabulary) of the tokens `ids` (batch, new), (batch, 1, vocabulary) of the last of them
        from a decoder with `last_logits`, and the caches that now hold them too.

        `mask` (batch, all) covers earlier and new tokens and is 0 on padding. Both are int64.
        """
        from onnxruntime import OrtValue

        if past is None:
            past = {
                name: OrtValue.ortvalue_from_shape_and_type([len(ids), heads, 0, width], element)
                for name, (heads, width, element) in self._caches.items()
            }
        fed = {IDS: OrtValue.ortvalue_from_numpy(ids), MASK: OrtValue.ortvalue_from_numpy(mask)}
        found = self._session.run_values({**fed, **past}, read=LOGITS)
        logits: np.ndarray = found.pop(LOGITS).numpy()
        return logits, {self._next[name]: value for name, value in found.items()}


def _loaded(path: Path | str, threads: int | None, device: Device) -> OnnxSession:
    """Raises UnavailableError, in place of what onnxruntime says, for a file in bf16 on a CPU."""
    try:
        return OnnxSession(path, threads=threads, device=device)
    except ArtifactError as error:
        from converters.precision.given import precision_of

        if device == "cpu" and precision_of(Path(path)) == "bf16":
            raise UnavailableError(
                "ONNX Runtime has no kernels for bf16 on CPUs",
                where=str(path),
                remedy='Put it on a GPU (--device cuda, device="cuda"), or take it in fp32, fp16 or int8.',
            ) from error
        raise


def generate(
    decoder: OnnxDecoder,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    *,
    stop: Collection[int] | None = None,
    told: Callable[[int], None] = lambda made: None,
) -> list[list[int]]:
    """The most likely next tokens of every prompt, at most `tokens` of them, one after another.

    Prompts are read together, padded on the left. A row ends with the first token of `stop` (None: the model's own;
    empty: never), which is part of the result. `told` hears after every step how many tokens each row has.
    Raises UsageError for an empty prompt, or more tokens than the model has positions for.
    """
    import numpy as np

    if tokens < 1 or not prompts or not all(prompts):
        raise UsageError("nothing to go on", expected="at least one token to make, and prompts that are not empty")
    width, longest = max(map(len, prompts)), decoder.about.longest
    if longest is not None and width + tokens > longest:
        raise UsageError(
            "more tokens than the model has positions for",
            expected=f"at most {longest}",
            got=f"{width} of the prompt and {tokens} new",
            remedy="Ask for fewer tokens or give a shorter prompt.",
        )
    ends = np.array(sorted(decoder.about.stop if stop is None else stop), np.int64)
    ids = np.zeros((len(prompts), width), np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    made: list[list[int]] = [[] for _ in prompts]
    done = np.zeros(len(prompts), bool)
    logits, past = decoder.read(ids, mask)
    for step in range(tokens):
        following = logits[:, -1].argmax(-1).astype(np.int64)
        for row, new in enumerate(following.tolist()):
            if not done[row]:
                made[row].append(new)
        done |= np.isin(following, ends)
        told(step + 1)
        if done.all() or step + 1 == tokens:
            break
        mask = np.concatenate([mask, np.ones((len(prompts), 1), np.int64)], axis=1)
        logits, past = decoder.read(following[:, None], mask, past)
    return made


def replay(decoder: OnnxDecoder, ids: np.ndarray, mask: np.ndarray, chunks: Sequence[int]) -> np.ndarray:
    """Logits (batch, answered, vocabulary) of the tokens that `answered` names, read in `chunks` of so many, each on
    the cache of the earlier."""
    import numpy as np

    parts, past, end = [], None, 0
    for chunk in chunks:
        start, end = end, end + chunk
        logits, past = decoder.read(np.ascontiguousarray(ids[:, start:end]), np.ascontiguousarray(mask[:, :end]), past)
        parts.append(logits)
    return np.concatenate(parts, axis=1)


def answered(decoder: OnnxDecoder, chunks: Sequence[int]) -> np.ndarray:
    """Which tokens a decoder gives logits of when it reads `chunks`: all, or the last of each."""
    import numpy as np

    ends = np.cumsum(chunks)
    return ends - 1 if decoder.last_logits else np.arange(ends[-1])


class Text:
    """Text to token ids and back by a `tokenizer.json`, with the tokenizers package."""

    def __init__(self, file: Path | str) -> None:
        """Raises UnavailableError without the package or the file, ArtifactError for another kind of file."""
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UnavailableError("tokenizers is not installed", remedy="pip install tokenizers") from error
        path = existing_file(file, "tokenizer file")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise ArtifactError("not a tokenizer file", where=str(path), got=str(error)[:200]) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def text(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text
