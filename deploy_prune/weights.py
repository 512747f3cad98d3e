"""Weights enter a model only whole, finite and under exactly the names and shapes the model has."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from deploy_prune.errors import ArtifactError
from deploy_prune.files import existing_file, read_json, sha256_file

if TYPE_CHECKING:
    from torch import Tensor, nn

_HEADER_LIMIT = 100 * 2**20  # the format's own limit
_AGAIN = "Download or copy the file again."


def check_safetensors(path: Path | str) -> None:
    """Refuse a safetensors file whose header is damaged or whose length is not what the header announces.

    A flipped bit in the payload changes neither; only `check_sha256` finds it. Raises ArtifactError.
    """
    path = existing_file(path, "weights file")
    size = path.stat().st_size
    with open(path, "rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise ArtifactError(
                "truncated safetensors file",
                where=str(path),
                expected="at least 8 bytes",
                got=f"{size} bytes",
                remedy=_AGAIN,
            )
        (length,) = struct.unpack("<Q", prefix)
        if length > min(_HEADER_LIMIT, size - 8):
            raise ArtifactError(
                "truncated or damaged safetensors file",
                where=str(path),
                remedy=_AGAIN,
                expected=f"a header of {length} bytes",
                got=f"{size} bytes in all",
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        announced = (
            8
            + length
            + max(
                (int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"), default=0
            )
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            "damaged safetensors header", where=str(path), got=str(error)[:200], remedy=_AGAIN
        ) from error
    if size != announced:
        fault = "truncated safetensors file" if size < announced else "safetensors file with a foreign tail"
        raise ArtifactError(fault, where=str(path), expected=f"{announced} bytes", got=f"{size} bytes", remedy=_AGAIN)


def read_safetensors(path: Path | str) -> dict[str, Tensor]:
    """All tensors of a file that passes `check_safetensors`. Raises ArtifactError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_safetensors(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ArtifactError(
            "damaged safetensors header", where=str(path), got=str(error)[:200], remedy=_AGAIN
        ) from error


def check_index(folder: Path) -> None:
    """Refuse a checkpoint in many files whose `model.safetensors.index.json` names a tensor that its file lacks.

    Only headers are read. Raises ArtifactError that lists every file or tensor at fault.
    """
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict):
        raise ArtifactError("the index names no files", where=str(index), expected='"weight_map"', remedy=_AGAIN)
    problems = []
    for name in sorted(set(listed.values())):
        wanted = {tensor for tensor, file in listed.items() if file == name}
        if Path(name).name != name or not (folder / name).is_file():
            problems.append(f"{name}: no such file, {len(wanted)} tensors")
            continue
        with safe_open(folder / name, "pt") as stream:
            problems += [f"{name}: lacks {tensor}" for tensor in sorted(wanted - set(stream.keys()))]
    if problems:
        raise ArtifactError(
            "a checkpoint in many files is not whole", where=str(index), problems=problems, remedy=_AGAIN
        )


def check_sha256(path: Path, expected: str | None) -> None:
    """Raises ArtifactError when the file's bytes are not the `expected` ones; does nothing without expectation."""
    if expected is None:
        return
    got = sha256_file(existing_file(path))
    if got != expected.lower():
        raise ArtifactError(
            "file is not the one the reference names",
            where=str(path),
            expected=f"sha256 {expected}",
            got=f"sha256 {got}",
            remedy=_AGAIN,
        )


def check_keys(
    where: str,
    *,
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    misshapen: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]] = (),
) -> None:
    """Raises one ArtifactError that lists every key at fault; `misshapen` holds (name, in the file, in the model)."""
    problems = [f"missing: {name}" for name in sorted(missing)]
    problems += [f"unexpected: {name}" for name in sorted(unexpected)]
    problems += [
        f"{name}: the file has shape {tuple(got)}, the model {tuple(want)}" for name, got, want in sorted(misshapen)
    ]
    if problems:
        raise ArtifactError(
            f"the weights do not fit the model ({len(problems)} problems)",
            where=where,
            problems=problems,
            remedy="Name the model these weights belong to; a differing head or "
            "image size is set as an argument, for example timm:NAME@FILE?num_classes=10.",
        )


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy `tensors` into `model`, which must have exactly these names and shapes. Raises ArtifactError."""
    own = model.state_dict()
    check_keys(
        where,
        missing=own.keys() - tensors.keys(),
        unexpected=tensors.keys() - own.keys(),
        misshapen=[
            (name, tuple(tensors[name].shape), tuple(own[name].shape))
            for name in own.keys() & tensors.keys()
            if tensors[name].shape != own[name].shape
        ],
    )
    model.load_state_dict(dict(tensors), strict=True)


def check_finite(model: nn.Module, where: str) -> None:
    """Raises ArtifactError that names every tensor holding NaN or infinity."""
    import torch

    problems = []
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor)  # one pass without a copy; both propagate NaN
            if torch.isfinite(low) and torch.isfinite(high):
                continue
            bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            problems.append(f"{name}: {bad} of {tensor.numel()} values are NaN or infinite")
    if problems:
        raise ArtifactError(
            "weights are not finite",
            where=where,
            problems=problems,
            remedy="Scores of such a model mean nothing; use a checkpoint from before it diverged.",
        )
