"""Verify: a bundle is whole, is what its manifest says, and computes what it computed where it was made. No torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import ArtifactError, DeployPruneError, ParityError
from deploy_prune.files import existing, sha256_file
from deploy_prune.plan import PrunePlan
from deploy_prune.progress import SILENT, Progress
from deploy_prune.release.bundle import walk
from deploy_prune.release.manifest import MANIFEST, Manifest, Member, check_relative
from deploy_prune.release.samples import Sample, load_samples

if TYPE_CHECKING:
    import numpy as np
    import onnx

_ONNX_TYPES = {1: "float32", 7: "int64"}
_REMEDY = "Do not ship this bundle; build it again, or copy it again from where it was whole."


@dataclass(frozen=True)
class MemberCheck:
    """One model asked its stored samples: `error` relative to the largest output, `agreement` of argmax."""

    name: str
    samples: int
    error: float
    tolerance: float
    agreement: float


@dataclass(frozen=True)
class VerifyReport:
    """A bundle that passed. `manifest_sha256` is the one hash that stands for the whole bundle."""

    name: str
    manifest_sha256: str
    files: int
    bytes: int
    members: tuple[MemberCheck, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(bundle: Path | str, *, progress: Progress = SILENT) -> VerifyReport:
    """Check every file, graph and stored answer of a bundle.

    Raises UnavailableError (no bundle, no onnxruntime), ArtifactError when anything is damaged, missing, foreign or not
    what the manifest says, else ParityError when a model no longer gives its stored answers; each lists everything.
    """
    start = time.perf_counter()
    bundle = existing(bundle, "bundle")
    if not bundle.is_dir():
        raise ArtifactError(
            "not a bundle",
            where=str(bundle),
            expected="a directory",
            got="a file",
            remedy="Pass the directory that `deploy-prune run` or `export` made.",
        )
    manifest = Manifest.load(bundle / MANIFEST)
    progress.start(len(manifest.members) + 1, "verify")
    try:
        damage = dict(_file_problems(bundle, manifest))
        progress.advance(1, "hashes")
        problems, differences, checks = list(damage.values()), [], []
        for member in manifest.members:
            if not damage.keys() & set(member.named_files()):  # a damaged file is reported once, and not opened
                found, text, check = _check(bundle, manifest, member)
                problems += [f"{member.name}: {problem}" for problem in found]
                differences += [f"{member.name}: {line}" for line in text]
                checks += [check] if check else []
            progress.advance(1, member.name)
    finally:
        progress.finish()
    if problems:
        raise ArtifactError(
            f"{len(problems)} problem{'s' * (len(problems) > 1)}",
            where=str(bundle),
            problems=[*problems, *differences],
            remedy=_REMEDY,
        )
    if differences:
        raise ParityError(
            "models no longer give their stored answers",
            where=str(bundle),
            problems=differences,
            remedy="The files are whole, so this runtime computes something else: try another version of onnxruntime.",
        )
    return VerifyReport(
        manifest.name,
        sha256_file(bundle / MANIFEST),
        len(manifest.files) + 1,
        sum(f.bytes for f in manifest.files.values()),
        tuple(checks),
        time.perf_counter() - start,
    )


def _check(bundle: Path, manifest: Manifest, member: Member) -> tuple[list[str], list[str], MemberCheck | None]:
    """(what is wrong with the member's files, where its answers differ, its figures)."""
    problems = list(_member_problems(bundle, manifest, member))
    if problems:
        return problems, [], None
    try:
        check, differences = _ask(bundle, manifest, member)
    except ArtifactError as error:
        return [f"{error.what}: {error.got}"], [], None
    return [], differences, check


def _file_problems(bundle: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(file, problem) for every file that is missing, foreign, linked or not as hashed."""
    found = {}
    for name, path in walk(bundle):
        if path.is_symlink():
            yield name, f"{name}: is a symbolic link; a bundle holds plain files"
        elif not path.is_file():
            yield name, f"{name}: is not a plain file"
        elif name != MANIFEST:
            found[name] = path
            if name not in manifest.files:
                yield name, f"{name}: is not in the manifest"
    for name, entry in manifest.files.items():
        if name not in found:
            if not (bundle / name).is_symlink():
                yield name, f"{name}: is missing"
            continue
        size = found[name].stat().st_size
        if size != entry.bytes:
            yield name, f"{name}: has {size} bytes, the manifest says {entry.bytes}"
        elif (digest := sha256_file(found[name])) != entry.sha256:
            yield name, f"{name}: has sha256 {digest[:12]}…, the manifest says {entry.sha256[:12]}…"


def _member_problems(bundle: Path, manifest: Manifest, member: Member) -> Iterator[str]:
    """What of a member is not as the manifest says: its plan, its graph, its interface."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    file = manifest.files[member.file]
    external = manifest.files[member.external].bytes if member.external else 0
    if (file.sha256, file.bytes + external) != (member.sha256, member.bytes):
        yield f"{member.file} is not the file that was measured (sha256 or bytes)"
    if member.plan is not None:
        try:
            plan = PrunePlan.load(bundle / member.plan)
        except DeployPruneError as error:
            yield str(error)
        else:
            if plan.weights_sha256 != manifest.base.weights_sha256:
                yield f"{member.plan} is for other weights ({plan.weights_sha256[:12]}…)"
            if (plan.asked, plan.achieved) != (member.asked, member.achieved):
                yield f"{member.plan} asks or achieves something else than the manifest says"
    if member.checkpoint is not None and f"{member.checkpoint}/model.safetensors" not in manifest.files:
        yield f"{member.checkpoint} holds no model.safetensors"
    path = bundle / member.file
    try:
        graph = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        yield f"{member.file} is not an ONNX file ({error})"
        return
    outside = list(_external_problems(graph, manifest, member))
    yield from outside
    if outside:
        return
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        yield f"{member.file} is not valid ONNX: {str(error).strip()[:300]}"
    yield from _interface_problems(graph, manifest, member)


def _external_problems(graph: onnx.ModelProto, manifest: Manifest, member: Member) -> Iterator[str]:
    """External data must be the one file the manifest names, beside the graph."""
    folder = Path(member.file).parent
    locations = set()
    for tensor in _tensors(graph.graph):
        locations |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    for location in sorted(locations):
        try:
            name = check_relative((folder / check_relative(location)).as_posix())
        except ValueError as error:
            yield f"{member.file} reads external data: {error}"
            continue
        if name != member.external or name not in manifest.files:
            yield f"{member.file} reads external data from {location}, which the manifest does not name"


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor of a graph and of the graphs inside it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _tensors(inner)


def _interface_problems(graph: onnx.ModelProto, manifest: Manifest, member: Member) -> Iterator[str]:
    for entry, values in ((manifest.inputs, graph.graph.input), ([manifest.output], graph.graph.output)):
        want = [(t.name, t.dtype, t.shape) for t in entry]
        got = [
            (
                v.name,
                _ONNX_TYPES.get(v.type.tensor_type.elem_type, "other"),
                [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
            )
            for v in values
        ]
        if want != got:
            yield f"{member.file} has {got}, the manifest says {want}"
    if foreign := sorted({node.domain for node in graph.graph.node} - {"", "ai.onnx"}):
        yield f"{member.file} uses operators of {', '.join(foreign)}"
    if [o.version for o in graph.opset_import if o.domain in ("", "ai.onnx")] != [member.opset]:
        yield f"{member.file} is not of opset {member.opset}"


def _ask(bundle: Path, manifest: Manifest, member: Member) -> tuple[MemberCheck, list[str]]:
    """Run the stored inputs; differences come back in words."""
    from converters.comparison import compare
    from converters.onnx_session import OnnxSession

    tolerance, worst, agreement, text = member.samples.tolerance, 0.0, 1.0, []
    samples = load_samples(bundle / member.samples.file)
    session = OnnxSession(bundle / member.file)
    for i, sample in enumerate(samples):
        try:
            output = session.run(sample.inputs)
        except ArtifactError as error:
            text.append(f"sample {i}: {error.got}")
            worst = float("inf")
            continue
        difference = compare(sample.output, output, tolerance=tolerance, valid=_valid(manifest, sample))
        worst, agreement = max(worst, difference.error), min(agreement, difference.agreement)
        if difference.error > tolerance:
            fault = difference.fault or f"error {difference.error:.2e}, tolerance {tolerance:.0e}"
            text.append(f"sample {i}: {fault}, first at output{list(difference.index or ())}")
    return MemberCheck(member.name, len(samples), worst, tolerance, agreement), text


def _valid(manifest: Manifest, sample: Sample) -> np.ndarray | None:
    """The stored attention mask, when the output has a position for each of its entries."""
    for entry in manifest.inputs:
        if entry.role == "mask" and manifest.output.shape[: len(entry.shape)] == entry.shape:
            return sample.inputs.get(entry.name)
    return None
