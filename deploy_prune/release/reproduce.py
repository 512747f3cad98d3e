"""Reproduce: a bundle's recipe run again, and whether the same came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from deploy_prune.files import sha256_file
from deploy_prune.progress import SILENT, Progress
from deploy_prune.release.manifest import MANIFEST, Manifest, Member

Kind = Literal["same", "other", "missing"]


@dataclass(frozen=True)
class Part:
    """`Part("models/s30.onnx", "same", "4f…", "4f…")`: a file or figure of the old bundle and of the new."""

    name: str
    kind: Kind
    old: str
    new: str


@dataclass(frozen=True)
class Reproduction:
    """What came out again. `versions` lists packages whose version differs: a reason for other bytes."""

    bundle: str
    out: str
    parts: tuple[Part, ...]
    versions: tuple[str, ...]

    @property
    def same(self) -> bool:
        return all(part.kind == "same" for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "same": self.same}


def reproduce(
    bundle: Path | str,
    out: Path | str,
    *,
    progress: Progress = SILENT,
    note: Callable[[str], None] = lambda text: None,
) -> Reproduction:
    """Run a bundle's recipe into `out`, without its timing, and compare path, plans, graphs and quality.

    The recipe may name code and data of this machine and environment variables, as any recipe. Raises the errors of a
    run.
    """
    from deploy_prune.pipeline import run_recipe
    from deploy_prune.recipe import recipe_from

    old = Manifest.load(Path(bundle) / MANIFEST)
    recipe = recipe_from(dict(old.recipe), ("bench.enabled=false",), where=f"the recipe of {bundle}")
    run_recipe(recipe, Path(out), progress=progress, note=note)
    return compare_runs(Path(bundle), Path(out))


def compare_runs(bundle: Path, again: Path) -> Reproduction:
    """Two bundles of one recipe, part by part."""
    old, new = (Manifest.load(folder / MANIFEST) for folder in (bundle, again))
    parts = [_file("path.safetensors", bundle, again)] if (bundle / "path.safetensors").is_file() else []
    newer = {member.name: member for member in new.members}
    for member in old.members:
        parts += [_file(name, bundle, again) for name in (member.plan, member.file, member.external) if name]
        if member.quality is not None:
            figures = _quality(member), _quality(newer.get(member.name))
            parts.append(Part(f"{member.name} {member.quality.metric}", _kind(*figures), *figures))
    versions = tuple(
        f"{name}: {old.versions.get(name)} then, {new.versions.get(name)} now"
        for name in sorted({*old.versions, *new.versions})
        if old.versions.get(name) != new.versions.get(name)
    )
    return Reproduction(str(bundle), str(again), tuple(parts), versions)


def _file(name: str, bundle: Path, again: Path) -> Part:
    old, new = (sha256_file(folder / name) if (folder / name).is_file() else "" for folder in (bundle, again))
    return Part(name, _kind(old, new), old[:12], new[:12])


def _quality(member: Member | None) -> str:
    return "" if member is None or member.quality is None else repr(member.quality.value)


def _kind(old: str, new: str) -> Kind:
    return "missing" if not new else "same" if old == new else "other"
