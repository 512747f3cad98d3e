"""Damaged and forged files: every reader must take them or refuse them in our words, never break, hang or eat memory.

    python -m bench.studies.fuzz BUNDLE --count 10000 --out bench/results/fuzz.json

Half of the inputs are damage (bytes flipped, cut, doubled, put in); half are forgeries: the structure is changed and
the digest made anew, so that the code behind the digest is reached too.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import struct
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

SLOW = 5.0  # seconds of processor time: a reader that takes longer for a few kilobytes hangs
MEMORY = 6 * 2**30  # bytes of address space; one that needs more for them was talked into it

ODD: tuple[Any, ...] = (
    None, True, 0, -1, 2**31, 2**63, 10**30, 0.5, -0.0, float("nan"), float("inf"), "", "x" * 5000, "../../etc/passwd",
    "/etc/passwd", "\ud800", "\x00", [], {}, [[]], [None] * 50, {"": {}}, "1e999", [[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]],
)  # fmt: skip


class Hang(BaseException):
    """A reader used up its time. No Exception, so that no reader catches it."""


@dataclass
class Tally:
    """What became of the inputs of one reader; `escapes` are the ones that broke it."""

    accepted: int = 0
    refused: int = 0
    escapes: list[str] = field(default_factory=list)
    slowest: float = 0.0


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--count", default=10_000, show_default=True, help="Inputs in all, shared out over the readers.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(bundle: Path, count: int, seed: int, out: Path | None) -> None:
    import resource

    from deploy_prune.files import write_json

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory() as room:
        tallies = fuzz(seeds(bundle, Path(room)), count, seed)
    for name, tally in tallies.items():
        click.echo(
            f"{name:10} accepted {tally.accepted:5}  refused {tally.refused:5}  broke {len(tally.escapes)}  "
            f"slowest {tally.slowest:.2f} s"
        )
        for text, times in Counter(tally.escapes).most_common(20):
            click.echo(f"  {times} x {text}")
    if out:
        figures = {name: {**vars(tally), "escapes": len(tally.escapes)} for name, tally in tallies.items()}
        write_json(out, {"inputs": count, "seed": seed, "readers": figures})
    raise SystemExit(any(tally.escapes for tally in tallies.values()))


def readers() -> dict[str, Callable[[Path], object]]:
    """Reader name -> function of a file."""
    from deploy_prune.delta.task_delta import TaskDelta
    from deploy_prune.path import SolutionPath
    from deploy_prune.plan import PrunePlan
    from deploy_prune.recipe import load_recipe
    from deploy_prune.release.manifest import Manifest
    from deploy_prune.release.rules import load_rules
    from deploy_prune.release.samples import load_samples
    from deploy_prune.release.scores import load_scores

    return {
        "manifest": Manifest.load,
        "plan": PrunePlan.load,
        "path": SolutionPath.load,
        "delta": TaskDelta.load,
        "recipe": load_recipe,
        "rules": load_rules,
        "samples": load_samples,
        "scores": load_scores,
    }


def seeds(bundle: Path, room: Path) -> dict[str, Path]:
    """Reader name -> a good file for it: those of a bundle, a built-in recipe, and a delta and rules made here."""
    from deploy_prune.recipe import builtin_recipes

    found = {
        "manifest": bundle / "manifest.json",
        "path": bundle / "path.safetensors",
        "recipe": builtin_recipes()["digits"],
        "rules": room / "gate.yaml",
        "delta": room / "delta.safetensors",
    }
    for name in ("plans", "samples", "scores"):
        files = sorted((bundle / name).glob("*")) if (bundle / name).is_dir() else []
        if files:
            found[name.removesuffix("s") if name == "plans" else name] = files[0]
    found["rules"].write_text("rules:\n  - {members: [s30], max_drop: 1%, batch: 8, max_p50_ms: 3, max_bytes: 20MB}\n")
    _make_delta(found["delta"])
    return {name: path for name, path in found.items() if path.is_file()}


def _make_delta(path: Path) -> None:
    import torch
    from torch import nn

    from deploy_prune.delta.task_delta import TaskDelta

    torch.manual_seed(0)
    base, result = (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)) for _ in range(2))
    result.load_state_dict(base.state_dict())
    with torch.no_grad():
        next(result.parameters()).flatten()[::7] += 1
    TaskDelta.between(base, result, ["1.weight", "1.bias"]).save(path)


def fuzz(good: Mapping[str, Path], count: int, seed: int = 0) -> dict[str, Tally]:
    """Feed `count` bad inputs to the readers of the good files."""
    from deploy_prune.errors import DeployPruneError

    signal.signal(signal.SIGPROF, _hangs)
    chance, tallies = random.Random(seed), {name: Tally() for name in good}
    known, contents = readers(), {name: path.read_bytes() for name, path in good.items()}
    with tempfile.TemporaryDirectory() as room:
        for i in range(count):
            name = list(good)[i % len(good)]
            path = Path(room) / f"input{good[name].suffix}"
            path.write_bytes(_input(name, contents[name], chance))
            tally, started = tallies[name], time.process_time()
            signal.setitimer(signal.ITIMER_PROF, SLOW)
            try:
                known[name](path)
                tally.accepted += 1
            except DeployPruneError:
                tally.refused += 1
            except (Exception, Hang) as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(place.filename).name}:{place.lineno}"
                tally.escapes.append(f"{type(error).__name__} at {where}: {str(error)[:120]}")
                shutil.copy(path, Path(tempfile.gettempdir()) / f"fuzz-{name}{path.suffix}")
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            tally.slowest = max(tally.slowest, time.process_time() - started)
    return tallies


def _hangs(signum: int, frame: object) -> None:
    raise Hang(f"more than {SLOW:g} s")


def _input(name: str, content: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.5:
        return damaged(content, chance)
    try:
        return _FORGERS.get(name, _forged_text)(content, chance)
    except (ValueError, OverflowError, RuntimeError):  # a structure that cannot even be written
        return damaged(content, chance)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """One to four accidents to the bytes."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        place, length = chance.randrange(len(data) + 1), chance.choice((1, 1, 1, 4, 64, 1024))
        what = chance.randrange(5)
        if what == 0 and data:
            data[min(place, len(data) - 1)] ^= 1 << chance.randrange(8)
        elif what == 1:
            del data[place : place + length]
        elif what == 2:
            data[place:place] = data[place : place + length]
        elif what == 3:
            data[place:place] = chance.randbytes(length)
        else:
            del data[place:]
    return bytes(data)


def changed(data: Any, chance: random.Random) -> Any:
    """JSON data with one to three values replaced, taken away, doubled or renamed."""
    data = json.loads(json.dumps(data))
    for _ in range(chance.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        _walk(data, places)
        if not places:
            return chance.choice(ODD)
        box, key = chance.choice(places)
        what = chance.randrange(5)
        if what < 3:
            box[key] = _nearby(box[key], chance)
        elif what == 3:
            del box[key]
        elif isinstance(box, dict):
            box[chance.choice(("x", "", str(key) * 2))] = box[key]
        else:
            box.insert(key, box[key])
    return data


def _walk(data: Any, places: list[tuple[Any, Any]]) -> None:
    for key, inner in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        places.append((data, key))
        _walk(inner, places)


def _nearby(value: Any, chance: random.Random) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and chance.random() < 0.5:
        return chance.choice((value + 1, -value, value * 10**6, 2**40, 2**62, float(value)))
    return chance.choice(ODD)


def _forged_json(content: bytes, chance: random.Random) -> bytes:
    return json.dumps(changed(json.loads(content), chance)).encode()


def _forged_manifest(content: bytes, chance: random.Random) -> bytes:
    from deploy_prune.release.manifest import _digest, _text

    data = changed(json.loads(content), chance)
    if isinstance(data, dict):
        data.pop("_digest", None)
        data["_digest"] = _digest(data)
    return _text(data).encode()


def _forged_text(content: bytes, chance: random.Random) -> bytes:
    import yaml

    if chance.random() < 0.1:
        return yaml_bomb()
    return yaml.safe_dump(changed(yaml.safe_load(content), chance), allow_unicode=True).encode()


def yaml_bomb() -> bytes:
    """A few hundred bytes that are billions of values when written out."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return "\n".join([*lines, "model: *a11", "rules: *a11", ""]).encode()


def _forged_safetensors(content: bytes, chance: random.Random) -> bytes:
    """Tensors and metadata changed; where there is a digest, it is right again."""
    import numpy as np
    from safetensors.numpy import load, save

    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    tensors = load(content)
    if chance.random() < 0.2:  # the header itself, over the same tensors
        text = json.dumps(changed(header, chance)).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]
    for _ in range(chance.randint(0, 2)):
        key = chance.choice(sorted(tensors))
        what = chance.randrange(5)
        if what == 0:
            tensors[key] = tensors[key][..., :0] if tensors[key].ndim else np.zeros((), np.uint8)
        elif what == 1:
            tensors[key] = tensors[key].astype(chance.choice((np.float16, np.int8, np.uint8, np.float64, np.bool_)))
        elif what == 2 and len(tensors) > 1:
            del tensors[key]
        elif what == 3:
            tensors[chance.choice(("x", "", "../x", f"{key}/x"))] = tensors[key]
        else:
            tensors[key] = np.full_like(tensors[key], 1) * np.float32("nan")
    meta = json.loads((header.get("__metadata__") or {}).get("deploy_prune", "null"))
    if isinstance(meta, dict) and chance.random() < 0.8:
        meta = changed(meta, chance)
    if isinstance(meta, dict):
        meta["sha256"] = _sealed(meta, tensors)
    tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    return save(tensors, {"deploy_prune": json.dumps(meta, sort_keys=True)} if meta is not None else None)


def _sealed(meta: dict[str, Any], tensors: Mapping[str, Any]) -> str:
    """The digest that makes a forged path or delta pass for whole."""
    import torch

    from deploy_prune.delta import task_delta
    from deploy_prune.path import _digest

    meta.pop("sha256", None)
    if meta.get("_type") == "TaskDelta":
        return task_delta._digest(meta, {key: torch.from_numpy(value.copy()) for key, value in tensors.items()})
    return _digest(meta, tensors)


_FORGERS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "manifest": _forged_manifest,
    "plan": _forged_json,
    "path": _forged_safetensors,
    "delta": _forged_safetensors,
    "samples": _forged_safetensors,
    "scores": _forged_safetensors,
}

if __name__ == "__main__":
    main()
