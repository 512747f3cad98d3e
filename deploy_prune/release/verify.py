"""Verify: a bundle is whole, is what its manifest says, and computes what it computed where it was made. No torch."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from deploy_prune.errors import ArtifactError, DeployPruneError, ParityError
from deploy_prune.files import existing, sha256_file
from deploy_prune.plan import PrunePlan
from deploy_prune.progress import SILENT, Progress
from deploy_prune.release.answers import Asker, MemberCheck, ask, askers
from deploy_prune.release.bundle import SIGNATURE, walk
from deploy_prune.release.decoding import check_decoder
from deploy_prune.release.graphs import graph_problems
from deploy_prune.release.manifest import MANIFEST, Manifest, Member
from deploy_prune.release.scores import contradiction, load_scores

_REMEDY = "Do not ship this bundle; build it again, or copy it again from where it was whole."


@dataclass(frozen=True)
class VerifyReport:
    """A bundle that passed. `manifest_sha256` is the one hash that stands for the whole bundle. A `signature` that
    nobody asked about was not checked."""

    name: str
    manifest_sha256: str
    files: int
    bytes: int
    members: tuple[MemberCheck, ...]
    seconds: float
    signature: Literal["none", "not checked", "good"] = "none"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(
    bundle: Path | str, *, key: Path | str | None = None, runtimes: Sequence[str] = (), progress: Progress = SILENT
) -> VerifyReport:
    """Check every file, graph and stored answer of a bundle, and with `key` that it is signed by its private half. The
    stored inputs are asked of onnxruntime on the CPU, or of the named `runtimes`.

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
    if key is not None:
        from deploy_prune.release.signing import check_signature

        check_signature(bundle, key)  # before anything else of the bundle is believed
    _refuse_odd(bundle / MANIFEST)
    manifest = Manifest.load(bundle / MANIFEST)
    ways = askers(runtimes)
    progress.start(len(manifest.members) + 1, "verify")
    try:
        damage = dict(_file_problems(bundle, manifest))
        progress.advance(1, "hashes")
        problems, differences, checks = list(damage.values()), [], []
        for member in manifest.members:
            if not damage.keys() & set(member.named_files()):  # a damaged file is reported once, and not opened
                found, text, made = _check(bundle, manifest, member, ways, damage)
                problems += [f"{member.name}: {problem}" for problem in found]
                differences += [f"{member.name}: {line}" for line in text]
                checks += made
                if member.decoder is not None:
                    found, text, made = check_decoder(bundle, manifest, member, member.decoder)
                    problems += [f"{member.name}: {problem}" for problem in found]
                    differences += [f"{member.name}, decoding: {line}" for line in text]
                    checks += made
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
        "good" if key is not None else "not checked" if (bundle / SIGNATURE).exists() else "none",
    )


def _refuse_odd(manifest: Path) -> None:
    """Raise ArtifactError for a manifest that is a link or no plain file: reading it could hang or leave the bundle."""
    if manifest.is_symlink() or (manifest.exists() and not manifest.is_file()):
        raise ArtifactError("the manifest is not a plain file", where=str(manifest), remedy=_REMEDY)


def _check(
    bundle: Path, manifest: Manifest, member: Member, ways: Mapping[str, Asker], damaged: Collection[str]
) -> tuple[list[str], list[str], list[MemberCheck]]:
    """(what is wrong with the member's files, where its answers differ, its figures in every runtime)."""
    problems = list(_member_problems(bundle, manifest, member, damaged))
    if problems:
        return problems, [], []
    differences, checks = [], []
    for runtime, asker in ways.items():
        try:
            check, text = ask(bundle, manifest, member, runtime, asker)
        except ArtifactError as error:
            return [f"{error.what}: {error.got}"], [], []
        differences += [f"{runtime}: {line}" for line in text] if len(ways) > 1 else text
        checks.append(check)
    return [], differences, checks


def _file_problems(bundle: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(file, problem) for every file that is missing, foreign, linked or not as hashed."""
    found = {}
    for name, path in walk(bundle):
        if path.is_symlink():
            yield name, f"{name}: is a symbolic link; a bundle holds plain files"
        elif not path.is_file():
            yield name, f"{name}: is not a plain file"
        elif name not in (MANIFEST, SIGNATURE):
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


def _member_problems(bundle: Path, manifest: Manifest, member: Member, damaged: Collection[str]) -> Iterator[str]:
    """What of a member is not as the manifest says: its plan, its graph, its interface."""
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
    if member.scores is not None:
        try:
            rows = load_scores(bundle / member.scores)
        except DeployPruneError as error:
            yield str(error)
        else:
            wrong = (
                "is of a member that was not judged" if member.quality is None else contradiction(member.quality, rows)
            )
            if wrong:
                yield f"{member.scores} {wrong}"
    if member.checkpoint is not None and f"{member.checkpoint}/model.safetensors" not in manifest.files:
        yield f"{member.checkpoint} holds no model.safetensors"
    yield from graph_problems(bundle, manifest, member, manifest.inputs, [manifest.output], member.precision)
    yield from _twin_problems(bundle, manifest, member, damaged)


def _twin_problems(bundle: Path, manifest: Manifest, member: Member, damaged: Collection[str]) -> Iterator[str]:
    """Weights of a member in another precision that are not its fp32 twin's, rounded. Files that are `damaged` are not
    opened; they are reported already."""
    from converters.precision.stored import stored_faults

    twin = next((m for m in manifest.members if m.name == member.twin), None)
    if twin is None:
        return
    for ours, theirs in ((member, twin), (member.decoder, twin.decoder)):
        if ours is None or theirs is None or {ours.file, theirs.file} & set(damaged):
            continue
        if theirs.external is None and ours.external is None:
            for fault in stored_faults(bundle / theirs.file, bundle / ours.file, member.precision):
                yield f"{ours.file}: {fault}"
