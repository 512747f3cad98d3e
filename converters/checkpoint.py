"""A compact model on disk: weights, the plan that cut them and the architecture they were cut from. No pickle.

DIR/model.safetensors   weights, tied tensors once
DIR/plan.json           what was kept
DIR/architecture.json   how to build the dense shell
DIR/checkpoint.json     version, base model, SHA-256 of the weights, how attention is computed
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.architecture import Architecture
from deploy_prune.errors import ArtifactError, PlanError, UsageError
from deploy_prune.files import atomic_dir, existing, read_json, sha256_file, write_json
from deploy_prune.plan import PrunePlan
from deploy_prune.weights import check_keys, read_safetensors

if TYPE_CHECKING:
    from torch import Tensor, nn

VERSION = 1
WEIGHTS, PLAN, ARCHITECTURE, RECORD = "model.safetensors", "plan.json", "architecture.json", "checkpoint.json"
OWN_FILES = (WEIGHTS, PLAN, ARCHITECTURE, RECORD)


def save_pruned(
    model: nn.Module,
    plan: PrunePlan,
    directory: Path | str,
    *,
    base_model: str | None = None,
    extra: Mapping[str, Path] | None = None,
    tokenizer: Any = None,
) -> Path:
    """Write the compact `model`, cut by `plan`, as a directory, atomically; returns the directory.

    `base_model` names the dense model in words (default: as the plan does). `extra` maps file names to files that are
    copied beside the weights; a `tokenizer` is saved in `tokenizer/`. Raises PlanError when `model` does not have the
    shape `plan` gives it.
    """
    from safetensors.torch import save_file

    _check_shape(model, plan)
    architecture = Architecture.of(model)
    if clash := sorted(n for n in extra or {} if n in (*OWN_FILES, "tokenizer") or Path(n).name != n):
        raise UsageError(
            "not names for extra files",
            got=", ".join(clash),
            expected="plain file names other than the checkpoint's own",
        )
    directory = Path(directory)
    with atomic_dir(directory) as room:
        save_file(own_tensors(model), room / WEIGHTS, metadata={"format": "pt"})
        plan.save(room / PLAN)
        write_json(room / ARCHITECTURE, architecture.to_json())
        for name, source in (extra or {}).items():
            shutil.copyfile(existing(source), room / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(room / "tokenizer")
        write_json(
            room / RECORD,
            {
                "_type": "PrunedCheckpoint",
                "_version": VERSION,
                "base_model": base_model or plan.model,
                "sha256": sha256_file(room / WEIGHTS),
                "bytes": (room / WEIGHTS).stat().st_size,
                "parameters": sum(p.numel() for p in model.parameters()),
                "attn_implementation": getattr(getattr(model, "config", None), "_attn_implementation", None),
            },
        )
    return directory


def load_pruned(directory: Path | str, *, trust_code: bool = False) -> nn.Module:
    """The model that `save_pruned` wrote, in eval mode: the same outputs, bit for bit.

    A checkpoint of a `python:` model names a function to call; that is done only with `trust_code`.
    Raises UnavailableError (a file is missing), ArtifactError (damaged, another version, weights that do not fit,
    all of them listed), UsageError (code not trusted).
    """
    import torch

    from converters.surgery import compact

    directory = existing(directory, "checkpoint directory")
    record = _record(directory)
    plan = PrunePlan.load(directory / PLAN)
    architecture = read_architecture(directory / ARCHITECTURE, trust_code)
    weights = existing(directory / WEIGHTS, "weights file")
    if (digest := sha256_file(weights)) != record["sha256"]:
        raise ArtifactError(
            "the weights are not those the checkpoint was written with",
            where=str(weights),
            expected=f"sha256 {record['sha256']}",
            got=f"sha256 {digest}",
            remedy="Copy the file again.",
        )
    with torch.random.fork_rng():  # the shell's throw-away weights must not disturb the caller's random numbers
        model = architecture.build()
    try:
        model = compact(model, plan, inplace=True, check_weights=False)
    except PlanError as error:
        raise ArtifactError(
            "the plan does not fit the architecture",
            where=str(directory),
            problems=error.problems,
            remedy="The files are not of one checkpoint; copy the whole directory again.",
        ) from error
    load_tensors(model, read_safetensors(weights), str(weights))
    if record.get("attn_implementation"):
        model.set_attn_implementation(record["attn_implementation"])  # type: ignore[operator]
    return model.eval()


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with tied tensors under their first name only, contiguous and on the CPU."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy what `own_tensors` gave of an equally shaped model into `model`. Raises ArtifactError with every misfit."""
    import torch

    own = dict(model.state_dict(keep_vars=True))
    first: dict[int, str] = {}
    names = {first.setdefault(id(tensor), name) for name, tensor in own.items()}
    check_keys(
        where,
        missing=names - tensors.keys(),
        unexpected=tensors.keys() - names,
        misshapen=[
            (name, tuple(tensors[name].shape), tuple(own[name].shape))
            for name in names & tensors.keys()
            if tensors[name].shape != own[name].shape
        ],
    )
    if other := sorted(name for name in names if tensors[name].dtype != own[name].dtype):
        raise ArtifactError(
            "weights of another type than the model's",
            where=where,
            problems=[f"{name}: {tensors[name].dtype}, expected {own[name].dtype}" for name in other],
        )
    with torch.no_grad():
        for name in names:
            own[name].copy_(tensors[name])


def _check_shape(model: nn.Module, plan: PrunePlan) -> None:
    from deploy_prune.adapters import find_sites

    problems = []
    found = {site.name: site for site in find_sites(model)}
    for name, entry in plan.keep.items():
        if name not in found and any(entry.values()):
            problems.append(f"{name}: not in the model, the plan keeps some of it")
    for name, site in found.items():
        for kind in site.counts:
            if name not in plan.keep or kind not in plan.keep[name]:
                problems.append(f"{name}: the plan says nothing of its {kind.value} units")
                continue
            # grouped heads: the compact site still says how many query heads share a key/value head
            planned = len(plan.kept(site, kind))
            if planned != site.units(kind):
                problems.append(f"{name}: has {site.units(kind)} {kind.value} units, the plan keeps {planned}")
    if problems:
        raise PlanError(
            "the model is not the one this plan cuts",
            problems=problems,
            remedy="Pass the result of compact(model, plan).",
        )


def _record(directory: Path) -> dict[str, Any]:
    path = directory / RECORD
    record = read_json(path)
    found = record if isinstance(record, dict) else {}
    if found.get("_type") != "PrunedCheckpoint" or found.get("_version") != VERSION:
        raise ArtifactError(
            "not a checkpoint this version reads",
            where=str(path),
            expected=f"PrunedCheckpoint version {VERSION}",
            got=f"{found.get('_type')!r} version {found.get('_version')!r}"[:80],
        )
    if not isinstance(found.get("sha256"), str) or not isinstance(found.get("attn_implementation"), str | None):
        raise ArtifactError("incomplete checkpoint record", where=str(path), expected="sha256 and attn_implementation")
    return found


def read_architecture(path: Path, trust_code: bool) -> Architecture:
    """What builds a checkpoint's dense shell. Raises ArtifactError, or UsageError for Python code not trusted."""
    data = read_json(path)
    if not (
        isinstance(data, dict)
        and set(data) == {"library", "name", "arguments"}
        and isinstance(data["name"], str)
        and data["library"] in ("timm", "hf", "python")
        and isinstance(data["arguments"], dict)
    ):
        raise ArtifactError("not an architecture", where=str(path), expected="library, name and arguments")
    architecture = Architecture(**data)
    if architecture.library == "python" and not trust_code:
        raise UsageError(
            "loading this checkpoint would run Python code",
            where=str(path),
            got=architecture.name,
            remedy="If you trust it, pass trust_code=True; on the command line --trust-code.",
        )
    if architecture.library == "timm" and ":" in architecture.name:
        raise ArtifactError(
            "not a timm architecture",
            where=str(path),
            got=architecture.name[:80],
            expected="a plain model name; hub and directory names would fetch something else",
        )
    return architecture
