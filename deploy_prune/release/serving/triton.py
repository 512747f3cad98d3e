"""A Triton model repository from a bundle: NAME/1/model.onnx and NAME/config.pbtxt for every member."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deploy_prune.errors import UsageError, did_you_mean
from deploy_prune.files import atomic_dir, existing

if TYPE_CHECKING:
    from deploy_prune.release.manifest import Manifest, TensorEntry

_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}


def write_repository(
    bundle: Path | str,
    out: Path | str,
    *,
    members: Sequence[str] = (),
    gpu: bool = False,
    max_batch: int = 32,
    delay_us: int = 500,
) -> list[str]:
    """Write the repository `out`, of all members or the named ones; returns their names.

    Raises UsageError for an unknown member or an `out` that holds something, ArtifactError for what is no bundle.
    """
    from deploy_prune.release.manifest import MANIFEST, Manifest

    bundle, out = existing(bundle, "bundle"), Path(out)
    manifest = Manifest.load(bundle / MANIFEST)
    known = {member.name: member for member in manifest.members}
    for name in members:
        if name not in known:
            raise UsageError(f"no member {name!r}", where=str(bundle), remedy=did_you_mean(name, list(known)))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("the output is taken", where=str(out), remedy="Choose a new directory.")
    chosen = list(members) or list(known)
    with atomic_dir(out) as temporary:
        for name in chosen:
            member = known[name]
            version = temporary / name / "1"
            version.mkdir(parents=True)
            shutil.copyfile(bundle / member.file, version / "model.onnx")
            if member.external is not None:  # the graph names it by its file name
                shutil.copyfile(bundle / member.external, version / Path(member.external).name)
            text = config(manifest, name, gpu=gpu, max_batch=max_batch, delay_us=delay_us)
            (temporary / name / "config.pbtxt").write_text(text, encoding="utf-8")
    return chosen


def config(manifest: Manifest, name: str, *, gpu: bool = False, max_batch: int = 32, delay_us: int = 500) -> str:
    """config.pbtxt of one member. Requests are batched where every tensor's first dimension is the batch; otherwise
    clients send whole batches."""
    tensors = [*manifest.inputs, manifest.output]
    batched = max_batch > 0 and all(entry.shape and entry.shape[0] == "batch" for entry in tensors)
    lines = [
        f'name: "{name}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {max_batch if batched else 0}",
        "input [",
        ",\n".join(_tensor(entry, batched) for entry in manifest.inputs),
        "]",
        "output [",
        _tensor(manifest.output, batched),
        "]",
        f"instance_group [ {{ count: 1 kind: {'KIND_GPU' if gpu else 'KIND_CPU'} }} ]",
    ]
    if batched:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}")
    return "\n".join([*lines, ""])


def _tensor(entry: TensorEntry, batched: bool) -> str:
    own = entry.shape[1:] if batched else entry.shape
    dims = ", ".join(str(dim) if isinstance(dim, int) else "-1" for dim in own)
    return f'  {{ name: "{entry.name}" data_type: {_TYPES[entry.dtype]} dims: [ {dims} ] }}'
