"""Kills and damage: a killed run leaves nothing half-written and ends, resumed, in the bytes of an undisturbed one; and
verify catches every changed byte of a bundle.

    python -m bench.studies.faults --kills 100 --corruptions 1000 --out bench/results/faults.json

The run is the digits recipe on untrained weights, with one member and no timing. Half of the kills (SIGKILL) fall at
the begin of a stage, half at random moments; a resumed run may be killed again.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import select
import shutil
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

SETTINGS = (
    "model=python:deploy_prune.demo:digits_vit_untrained",
    "family.sparsities=[0.5]",
    "search.examples=128",
    "refit.examples=128",
    "quality.limit=64",
    "bench.enabled=false",
)


@dataclass
class Kills:
    """`ended` counts the killed runs that were resumed to their end; `unequal` names what differed there, `unsound`
    what was left in the place of the output after a kill and was no whole bundle."""

    done: int = 0
    at: Counter[str] = field(default_factory=Counter)
    ended: int = 0
    unequal: list[str] = field(default_factory=list)
    unsound: list[str] = field(default_factory=list)


@click.command(help=__doc__)
@click.option("--kills", default=100, show_default=True)
@click.option("--corruptions", default=1000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(kills: int, corruptions: int, seed: int, out: Path | None) -> None:
    from deploy_prune.files import write_json

    import_all()
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="faults-") as room:
        whole = Path(room) / "whole"
        started = time.monotonic()
        if _run(whole, None, None) is not None:
            raise click.ClickException("the undisturbed run did not end")
        took = time.monotonic() - started
        click.echo(f"undisturbed run: {took:.1f} s")
        killed = kill_runs(Path(room), whole, kills, took, chance)
        click.echo(f"{killed.done} kills, {killed.ended} runs resumed to their end, {len(killed.unequal)} unequal, "
                   f"{len(killed.unsound)} half-written")  # fmt: skip
        missed = corrupt(whole, corruptions, chance)
        click.echo(f"{corruptions} bytes changed, {len(missed)} not caught")
    figures = {
        "settings": SETTINGS,
        "seed": seed,
        "kills": {**vars(killed), "at": dict(killed.at)},
        "corruptions": {"done": corruptions, "missed": missed},
    }
    if out:
        write_json(out, figures)
    raise SystemExit(bool(killed.unequal or killed.unsound or missed))


def kill_runs(room: Path, whole: Path, kills: int, took: float, chance: random.Random) -> Kills:
    """Start, kill and resume runs until `kills` were killed, and resume the last of them to its end."""
    found, expected, out = Kills(), contents(whole), room / "out"
    boundaries = sum(1 for _ in _stages(whole)) + 4
    while True:
        if found.done >= kills:
            place = _run(out, None, None)
        elif found.done % 2:
            place = _run(out, chance.randrange(1, boundaries), None)
        else:
            place = _run(out, None, chance.uniform(0, took))
        if place is not None:
            found.done += 1
            found.at[place] += 1
            if out.exists() and (wrong := unsound(out)):
                found.unsound.append(wrong)
            if chance.random() < 0.6:
                continue
            _run(out, None, None)
        if not out.exists():
            found.unequal.append(f"after kill {found.done}: the resumed run left nothing")
        else:
            found.ended += 1
            found.unequal += [f"after kill {found.done}: {name}" for name in differing(expected, contents(out))]
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name("out.work"), ignore_errors=True)
        click.echo(f"{found.done} kills", err=True)
        if found.done >= kills:
            return found


def _stages(bundle: Path) -> list[str]:
    return sorted(path.stem for path in (bundle / "models").glob("*.onnx"))


def _run(out: Path, stage: int | None, seconds: float | None) -> str | None:
    """Run or resume in a process of its own; kill it at the begin of its `stage`-th stage, or after `seconds`. Where it
    was killed, None when it ended first. Raises ClickException when it failed of itself."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _child(out, write)
    os.close(write)
    place, seen, deadline = "start", 0, None if seconds is None else time.monotonic() + seconds
    with open(read, "rb", buffering=0) as stream:
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([stream], [], [], left)
            line = stream.readline() if ready else b""
            if ready and not line:  # the child has ended
                _, status = os.waitpid(child, 0)
                if status:
                    raise click.ClickException(f"a run failed of itself, status {status}")
                return None
            if line.endswith(b" ...\n"):
                place, seen = line.decode().removesuffix(" ...\n"), seen + 1
            if not ready or (stage is not None and seen >= stage):
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                return place if os.WIFSIGNALED(status) else None


def import_all() -> None:
    """What every run imports, once: the runs are forks of this process, which computes nothing itself before."""
    for name in (
        *("onnx", "onnx_ir", "onnxruntime", "onnxscript", "timm", "transformers", "sklearn.datasets"),
        *("torch.export", "torch.onnx._internal.exporter", "deploy_prune.methods.spp", "deploy_prune.release.verify"),
        *("deploy_prune.pipeline.run", "deploy_prune.pipeline.making", "converters.onnx_export", "converters.parity"),
    ):
        importlib.import_module(name)


def _child(out: Path, write: int) -> None:
    code = 1
    try:
        from deploy_prune.pipeline import run_recipe
        from deploy_prune.recipe import load_recipe

        def note(text: str) -> None:
            os.write(write, f"{text}\n".encode())

        run_recipe(load_recipe("digits", SETTINGS), out, mode="resume", note=note)
        code = 0
    finally:
        os._exit(code)


def unsound(out: Path) -> str | None:
    from deploy_prune.errors import DeployPruneError
    from deploy_prune.release.verify import verify

    try:
        verify(out)
    except DeployPruneError as error:
        return str(error)
    return None


def contents(bundle: Path) -> dict[str, Any]:
    """File -> its hash; of the manifest, what it says but for clocks and the machine's load."""
    from deploy_prune.files import sha256_file

    found: dict[str, Any] = {
        str(path.relative_to(bundle)): sha256_file(path) for path in sorted(bundle.rglob("*")) if path.is_file()
    }
    manifest = json.loads((bundle / "manifest.json").read_text())
    for part in (manifest, *manifest["members"]):
        part.pop("seconds")
    for key in ("_digest", "environment"):
        manifest.pop(key)
    return {**found, "manifest.json": manifest}


def differing(expected: dict[str, Any], got: dict[str, Any]) -> list[str]:
    return [name for name in sorted({*expected, *got}) if expected.get(name) != got.get(name)]


def corrupt(bundle: Path, count: int, chance: random.Random) -> list[str]:
    """Change one random byte of one random file `count` times; what verify did not catch as damage."""
    from deploy_prune.errors import ArtifactError
    from deploy_prune.release.verify import verify

    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    missed = []
    for _ in range(count):
        path = chance.choice(files)
        whole = path.read_bytes()
        place = chance.randrange(len(whole))
        data = bytearray(whole)
        data[place] ^= chance.randrange(1, 256)
        path.write_bytes(data)
        try:
            verify(bundle)
        except ArtifactError:
            pass
        else:
            missed.append(f"{path.relative_to(bundle)} at {place}")
        finally:
            path.write_bytes(whole)
    verify(bundle)
    return missed


if __name__ == "__main__":
    main()
