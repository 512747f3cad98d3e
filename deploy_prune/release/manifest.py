"""The manifest says what a bundle is, what was measured on it, and the hash of every other file in it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deploy_prune.errors import ArtifactError
from deploy_prune.files import atomic_file, existing, read_json
from deploy_prune.plan import Costs, Target
from deploy_prune.precision_options import Precision

TYPE, VERSION = "Bundle", 1
MANIFEST = "manifest.json"
_SIZE_LIMIT = 64 * 2**20
_REMEDY = "The bundle is damaged or was edited; build it again, or copy it again from where it was whole."

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Text = Annotated[str, Field(max_length=10_000)]
Metric = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,99}$")]  # recall@1
Count = Annotated[int, Field(ge=0)]


def check_relative(path: str) -> str:
    """`path` when it is a plain relative POSIX path below the bundle; raises ValueError otherwise."""
    pure = PurePosixPath(path)
    plain = pure.parts and not pure.is_absolute() and ".." not in pure.parts and str(pure) == path
    if not plain or "\\" in path or ":" in path or "\0" in path or len(path) > 500:
        raise ValueError(f"not a plain path inside the bundle: {path[:80]!r}")
    return path


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(_Part):
    sha256: Sha256
    bytes: Count


class BaseModelEntry(_Part):
    """The dense model: its reference, the hash of its weights (see `weights_sha256`), its size. Where the manifest has
    a `delta`, the reference is that of the model before it, hash and size are those of the model after it."""

    reference: Text
    weights_sha256: Sha256
    parameters: Count


class OriginEntry(_Part):
    """Licence and origin of base weights or data, and who states them; None is unknown."""

    license: Text | None = None
    source: Text | None = None
    stated_by: Text | None = None


class ProvenanceEntry(_Part):
    """`data` are the calibration data."""

    model: OriginEntry = OriginEntry()
    data: OriginEntry = OriginEntry()


class TensorEntry(_Part):
    """An input or output; a string in `shape` names a dynamic dimension."""

    name: Name
    dtype: Literal["float32", "float16", "bfloat16", "int64"]
    shape: Annotated[list[int | Name], Field(max_length=8)]
    role: Literal["values", "ids", "mask"] = "values"


class QualityEntry(_Part):
    """The task's metric on the evaluation data; `interval` is 95 %. `detail` is what repeats the figure."""

    metric: Metric
    value: float
    n: Count
    interval: tuple[float, float]
    higher_is_better: bool
    detail: dict[str, Any] = {}


class RatioEntry(_Part):
    """Median latency over that of the dense model, with its 95 % interval; below 1 is faster."""

    value: float
    low: float
    high: float


class LatencyEntry(_Part):
    """One member in one cell; milliseconds per call, examples per second. `past`: the call is of a decoder, one new
    token per text on a cache of so many, or `sequence` where that is given. `trusted` when dense agreed with itself."""

    runtime: Name
    device: Text | None
    batch: Count
    sequence: Count | None = None
    past: Count | None = None
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    throughput: float
    ratio: RatioEntry
    verdict: Text
    stable: bool
    trusted: bool


class LatencyFitEntry(_Part):
    """How a member chosen by latency fits what was asked: the limit, what the table predicted (`uncorrected_ms`), that
    corrected by an earlier check, and what the whole graph took beside the dense model, milliseconds per call. `met`:
    within 3 % of the limit. `corrected`: the plan was chosen anew after such a check. `past`: the graph is a
    decoder whose cache holds so many tokens; `precision` is that of the timed graphs."""

    runtime: Name
    threads: Count | None
    batch: Count
    sequence: Count | None = None
    past: Annotated[int, Field(ge=0)] | None = None
    precision: Literal["fp32", Precision] = "fp32"
    budget: Literal["latency", "speedup"]
    value: float
    limit_ms: float
    predicted_ms: float
    uncorrected_ms: float
    measured_ms: float
    dense_ms: float
    ratio: RatioEntry
    corrected: bool
    trusted: bool
    met: bool
    chosen_by: Text = ""


class SamplesEntry(_Part):
    """Stored inputs with the torch model's outputs; the ONNX file must give them within `tolerance`."""

    file: Text
    tolerance: Annotated[float, Field(gt=0)]

    _relative = field_validator("file")(check_relative)


class RecoveryEntry(_Part):
    """How a member was trained after the cut. `before` and `after` are `metric` on calibration examples held out from
    the training, `quality_before` that of the untrained member on the evaluation data. `seed` names the larger member
    whose recovered weights it started from. `changed` counts the weights that a sparse delta changed."""

    metric: Metric
    before: float
    after: float
    held_out: Count
    trained_on: Count
    steps: Count
    best_step: Count
    seconds: float
    quality_before: QualityEntry | None = None
    seed: Name | None = None
    changed: int | None = None


class DeltaEntry(_Part):
    """The task delta that made the dense model of the base: how many values it changes, and the task's metric on
    calibration examples held out from its training, before and after."""

    file: Text
    fit: Name
    changed: Count
    share: float
    metric: Metric
    before: float
    after: float
    seconds: float

    _relative = field_validator("file")(check_relative)

    @staticmethod
    def of(file: str, learned: dict[str, Any]) -> DeltaEntry:
        """From what the training of the delta left."""
        return DeltaEntry(file=file, **{name: learned[name] for name in DeltaEntry.model_fields if name != "file"})


class CacheEntry(_Part):
    """A key/value cache of a decoder: that of the attention at `depth`."""

    depth: Count
    heads: Count
    key_width: Count
    value_width: Count


class DecoderEntry(_Part):
    """A member with its key/value cache, in a directory to be served from. One graph for prefill and decoding.

    `samples` are tokens, the pieces they are fed in, and the torch model's logits. `genai` is the settings file of
    onnxruntime-genai, or `genai_refused` says why there is none.
    """

    directory: Text
    file: Text
    external: Text | None = None
    sha256: Sha256
    bytes: Count
    opset: Annotated[int, Field(ge=1)]
    variant: Literal["plain", "standard", "ort"] = "plain"
    caches: Annotated[list[CacheEntry], Field(max_length=1000)]
    inputs: Annotated[list[TensorEntry], Field(min_length=2, max_length=2002)]
    outputs: Annotated[list[TensorEntry], Field(min_length=1, max_length=2001)]
    parity: dict[str, Any]
    samples: SamplesEntry
    genai: Text | None = None
    genai_refused: Text | None = None

    @field_validator("directory", "file", "external", "genai")
    @classmethod
    def _relative(cls, path: str | None) -> str | None:
        return None if path is None else check_relative(path)

    def named_files(self) -> list[str]:
        """Files of the bundle that the decoder cannot do without."""
        return [path for path in (self.file, self.external, self.samples.file, self.genai) if path is not None]


class Member(_Part):
    """One model of the family. `weight_bytes` are the bytes of parameters in the file, exactly; `variant` says which
    operators it may use (see converters/variants.py). One in another precision than fp32 was made from its `twin`, and
    its samples are its own answers; costs are those of the twin."""

    name: Name
    file: Text
    external: Text | None = None
    sha256: Sha256
    bytes: Count
    opset: Annotated[int, Field(ge=1)]
    variant: Literal["plain", "standard", "ort"] = "plain"
    precision: Literal["fp32", Precision] = "fp32"
    twin: Name | None = None
    weight_bytes: Count
    plan: Text | None = None
    checkpoint: Text | None = None
    stock: Text | None = None
    adapters: Text | None = None
    history: Text | None = None
    asked: Target | None = None
    achieved: Costs | None = None
    quality: QualityEntry | None = None
    scores: Text | None = None
    recovery: RecoveryEntry | None = None
    decoder: DecoderEntry | None = None
    parity: dict[str, Any]
    samples: SamplesEntry
    latency: list[LatencyEntry] = []
    latency_fit: LatencyFitEntry | None = None
    audit: dict[str, Any] | None = None
    seconds: dict[str, float] = {}

    @field_validator("file", "external", "plan", "checkpoint", "stock", "adapters", "history", "scores")
    @classmethod
    def _relative(cls, path: str | None) -> str | None:
        return None if path is None else check_relative(path)

    def named_files(self) -> list[str]:
        """Files of the bundle that the member cannot do without."""
        named = (self.file, self.external, self.plan, self.history, self.samples.file, self.scores)
        own = [path for path in named if path is not None]
        return own + (self.decoder.named_files() if self.decoder else [])


class Manifest(_Part):
    """`members[0]` is the dense model. `files` has every file of the bundle but the manifest itself.

    `run` is the fingerprint of everything the bundle was made from; `bench` the cells of the latency table with their
    self-checks; `variant` why the graphs have the form they have, where that was measured.
    """

    name: Name
    run: Text | None = None
    base: BaseModelEntry
    provenance: ProvenanceEntry = ProvenanceEntry()
    task: dict[str, Any]
    recipe: dict[str, Any]
    versions: dict[str, str | None]
    environment: dict[str, Any]
    inputs: Annotated[list[TensorEntry], Field(min_length=1, max_length=32)]
    output: TensorEntry
    delta: DeltaEntry | None = None
    members: Annotated[list[Member], Field(min_length=1, max_length=1000)]
    bench: Annotated[list[dict[str, Any]], Field(max_length=10_000)] = []
    variant: dict[str, Any] | None = None
    seconds: dict[str, float] = {}
    files: Annotated[dict[str, FileEntry], Field(max_length=100_000)] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        problems = []
        for path in self.files:
            try:
                check_relative(path)
            except ValueError as error:
                problems.append(str(error))
        if MANIFEST in self.files:
            problems.append("the manifest lists itself")
        names = [member.name for member in self.members]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            problems.append(f"members named twice: {', '.join(doubled)}")
        exact = {member.name for member in self.members if member.precision == "fp32"}
        problems += [
            f"member {member.name} is {member.precision} and has no fp32 twin among the members"
            for member in self.members
            if (member.precision != "fp32" or member.twin) and member.twin not in exact - {member.name}
        ]
        for member in self.members:
            problems += [
                f"member {member.name} names {named}, which is not among the files"
                for named in member.named_files()
                if self.files and named not in self.files
            ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def dense(self) -> Member:
        return self.members[0]

    def to_json(self) -> dict[str, Any]:
        body = {"_type": TYPE, "_version": VERSION, **self.model_dump(mode="json")}
        return {**body, "_digest": _digest(body)}

    def save(self, path: Path | str) -> None:
        """Write the manifest, atomically; the same manifest is always the same bytes."""
        with atomic_file(path) as temporary:
            temporary.write_text(_text(self.to_json()), encoding="utf-8")

    @staticmethod
    def load(path: Path | str) -> Manifest:
        """Read and check a manifest. Raises UnavailableError (no file) or ArtifactError with every problem."""
        path = existing(path, "manifest")
        data = read_json(path, limit=_SIZE_LIMIT)
        if not isinstance(data, dict) or data.get("_type") != TYPE:
            raise ArtifactError(
                "not a manifest",
                where=str(path),
                expected=f'"_type": "{TYPE}"',
                got=repr(data.get("_type") if isinstance(data, dict) else type(data).__name__)[:80],
                remedy="Pass the directory that `deploy-prune run` or `export` made.",
            )
        if data.get("_version") != VERSION:
            raise ArtifactError(
                "unknown manifest version",
                where=str(path),
                expected=str(VERSION),
                got=repr(data.get("_version"))[:40],
                remedy="Install a deploy-prune that knows it.",
            )
        body = {key: value for key, value in data.items() if key != "_digest"}
        problems = []
        try:
            manifest = Manifest.model_validate({k: v for k, v in body.items() if k not in ("_type", "_version")})
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}"[:300] for e in error.errors()[:50]]
        if not _intact(data, body, path):
            problems.append("the contents are not those that were written (_digest)")
        if problems:
            raise ArtifactError("not a valid manifest", where=str(path), problems=problems, remedy=_REMEDY)
        return manifest


def _intact(data: dict[str, Any], body: dict[str, Any], path: Path) -> bool:
    """Whether digest and text are as written. This finds accidents; whoever edits on purpose can compute the digest
    anew, and only a signature would tell."""
    try:
        return data.get("_digest") == _digest(body) and path.read_bytes() == _text(data).encode()
    except ValueError:  # NaN, or text that is not Unicode
        return False


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(_text(body).encode()).hexdigest()


def _text(data: Any) -> str:
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
