"""Putting a bundle together: files in their places, a model card, and a manifest that hashes them all.

manifest.json  README.md  models/NAME.onnx  decoders/NAME/  checkpoints/NAME/  plans/NAME.json  samples/NAME.safetensors
path.safetensors  bench/
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deploy_prune.errors import ArtifactError
from deploy_prune.files import existing, sha256_file
from deploy_prune.release.card import model_card
from deploy_prune.release.manifest import (
    MANIFEST,
    FileEntry,
    LatencyEntry,
    Manifest,
    Member,
    RatioEntry,
    check_relative,
)

CARD, REPORT, RUNNER = "README.md", "report.html", "run.py"
SIGNATURE = "model.sig"  # signs the manifest too, which therefore cannot list it


def place(bundle: Path, name: str, source: Path | str, *, link: bool = False) -> str:
    """Copy the file or directory `source` to `name` inside `bundle`; returns `name`, for the manifest.

    `link` hard-links where the file system can, for sources that nobody will write to again: large models then cost
    no second copy.
    """
    check_relative(name)
    source, target = existing(source), bundle / name
    if source.is_dir():
        for file in sorted(source.rglob("*")):
            if file.is_file():
                place(bundle, f"{name}/{file.relative_to(source).as_posix()}", file, link=link)
        return name
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        raise ArtifactError("two files for one place in the bundle", where=name)
    if link:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return name
    shutil.copyfile(source, target)
    return name


def finish(bundle: Path, manifest: Manifest) -> Manifest:
    """Write the model card, run.py, the report and the manifest of a directory whose other files are in place; returns
    the manifest.

    `manifest.files` is filled in here. Raises ArtifactError when a member names a file that is not there.
    """
    from deploy_prune.release.report import report_html

    (bundle / CARD).write_text(model_card(manifest), encoding="utf-8")
    shutil.copyfile(Path(__file__).parent / "serving" / "run_py.txt", bundle / RUNNER)
    (bundle / REPORT).write_text(report_html(bundle, manifest), encoding="utf-8")
    files = {
        name: FileEntry(sha256=sha256_file(path), bytes=path.stat().st_size)
        for name, path in walk(bundle)
        if name not in (MANIFEST, SIGNATURE)
    }
    problems = [
        f"member {member.name}: {path} is not there"
        for member in manifest.members
        for path in member.named_files()
        if path not in files
    ]
    problems += [
        f"member {member.name}: {graph.file} is not the file that was exported"
        for member in manifest.members
        for graph in (member, member.decoder)
        if graph is not None and graph.file in files and files[graph.file].sha256 != graph.sha256
    ]
    if problems:
        raise ArtifactError("the bundle is not complete", where=str(bundle), problems=problems)
    whole = Manifest.model_validate({**manifest.model_dump(), "files": files})
    whole.save(bundle / MANIFEST)
    return whole


def walk(bundle: Path) -> Iterable[tuple[str, Path]]:
    """(relative POSIX name, path) of everything in `bundle` that is not a directory, sorted; links are not followed."""
    for folder, folders, files in os.walk(bundle):
        folders.sort()
        linked = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in sorted([*files, *linked]):
            path = Path(folder) / name
            yield path.relative_to(bundle).as_posix(), path


def latency_entries(cells: Iterable[Mapping[str, Any]]) -> dict[str, list[LatencyEntry]]:
    """Member name -> its line in every cell; `cells` are the JSON of bench's latency reports."""
    entries: dict[str, list[LatencyEntry]] = {}
    for cell in cells:
        for line in cell["latencies"]:
            ratio = line["ratio"]
            entries.setdefault(line["name"], []).append(
                LatencyEntry(
                    runtime=cell["runtime"],
                    device=cell["device"],
                    batch=cell["batch"],
                    sequence=cell.get("sequence"),
                    past=cell.get("past"),
                    ratio=RatioEntry(value=ratio["value"], low=ratio["low"], high=ratio["high"]),
                    trusted=cell["self_check"]["result"] == "passed",
                    **{
                        key: line[key]
                        for key in ("p50_ms", "p90_ms", "p99_ms", "mean_ms", "throughput", "verdict", "stable")
                    },
                )
            )
    return entries


def member_from(name: str, exported: Mapping[str, Any], **fields: Any) -> Member:
    """A member from the JSON of its ExportReport; its graph lies at models/NAME.onnx. `fields` are Member's others."""
    return Member(
        name=name,
        file=f"models/{name}.onnx",
        external=f"models/{exported['external']}" if exported["external"] else None,
        sha256=exported["sha256"],
        bytes=exported["bytes"],
        opset=exported["opset"],
        variant=exported["variant"],
        weight_bytes=sum(exported["initializers"]["weights"].values()),
        **fields,
    )
