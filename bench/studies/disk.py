"""Disks that are full and places that may not be written: a run ends in our words, and resumed gives the same bytes.

    python -m bench.studies.disk --runs 40 --out bench/results/disk.json

The digits run of bench.studies.faults on a tmpfs of its own, by turns: the disk fills up, it is full of temporary
files, files may not grow, and from a random stage on the disk is mounted read-only, the work directory loses its write
permission, or a whole stage may not be read. Then the trouble is mended and the run resumed. Every other command that
writes a file is tried on a full and on a read-only disk. All of it happens in a mount namespace of its own, without
root's right to pass over permissions (unshare, setpriv: util-linux), and leaves no mount behind.
"""

from __future__ import annotations

import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click

from bench.studies.faults import SETTINGS, contents, differing, import_all, unsound

INSIDE = "DEPLOY_PRUNE_DISK_STUDY"  # set where the mounts are our own
PLENTY = 2**30  # bytes: a disk that nobody fills
PAGE = 4096  # a tmpfs holds whole pages
RUN = ["run", "digits", *(word for setting in SETTINGS for word in ("--set", setting)), "--resume", "--out"]


@dataclass
class Ended:
    """How a command ended: its exit code, what it said, the stages it began."""

    code: int
    said: str
    stages: list[str]


@dataclass
class Trouble:
    """Runs that met trouble, by kind and by the stage they were in; `undisturbed` ended without noticing. `wrong` names
    what was not as promised: another exit code, a traceback, a half-written output, other bytes after `--resume`."""

    done: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    at: Counter[str] = field(default_factory=Counter)
    undisturbed: int = 0
    writers: int = 0
    wrong: list[str] = field(default_factory=list)


@click.command(help=__doc__)
@click.option("--runs", default=40, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(runs: int, seed: int, out: Path | None) -> None:
    from deploy_prune.files import write_json

    if not os.environ.get(INSIDE):
        os.execvpe(
            "unshare", [*own_mounts(), sys.executable, "-m", __spec__.name, *sys.argv[1:]], {**os.environ, INSIDE: "1"}
        )
    import_all()
    with tempfile.TemporaryDirectory(prefix="disk-") as room:
        found = study(Path(room), runs, random.Random(seed))
    for text in found.wrong:
        click.echo(f"WRONG {text}")
    click.echo(f"{found.done} runs, {found.undisturbed} of them undisturbed, {found.writers} writers, "
               f"{len(found.wrong)} wrong")  # fmt: skip
    if out:
        write_json(out, {"settings": SETTINGS, "seed": seed, **vars(found)})
    raise SystemExit(bool(found.wrong))


def own_mounts() -> list[str]:
    """What to put before a command so that it may mount, and so that permissions hold for it even where it is root."""
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", "--mount", *user, "setpriv", "--bounding-set", "-dac_override,-dac_read_search"]


def study(room: Path, runs: int, chance: random.Random) -> Trouble:
    """Disturb `runs` runs, then every other writer once on each disk."""
    found = Trouble()
    with disk(room / "calm", PLENTY) as place:
        peak = 0

        def look() -> None:
            nonlocal peak
            peak = max(peak, used(place))

        calm = command([*RUN, str(place / "out")], watch=look)
        if calm.code:
            raise click.ClickException(f"the undisturbed run did not end: {calm.said[-2000:]}")
        whole = Path(shutil.copytree(place / "out", room / "whole"))
    expected = contents(whole)
    kinds = [full_disk, full_temporary, short_files, read_only_disk, no_permission, unreadable_stage]
    for number in range(runs):
        disturb = kinds[number % len(kinds)]
        found.done += 1
        found.kinds[disturb.__name__] += 1
        with disk(room / "disk", PLENTY) as place:
            ended = disturb(place, calm.stages, peak, chance)
            judge(found, f"{disturb.__name__} {number}", ended, place)
            resumed = command([*RUN, str(place / "out")])
            if resumed.code:
                found.wrong.append(f"{disturb.__name__} {number}: not resumed: {resumed.said[-600:]}")
            else:
                found.wrong += [
                    f"{disturb.__name__} {number}: {name} differs"
                    for name in differing(expected, contents(place / "out"))
                ]
        click.echo(f"{found.done} {disturb.__name__}: {ended.code}, {' '.join(ended.stages[-1:])}", err=True)
    writers(found, whole, room)
    return found


def judge(found: Trouble, name: str, ended: Ended, place: Path) -> None:
    """Whether a disturbed run ended as promised."""
    if ended.code == 0:
        found.undisturbed += 1
        return
    found.at[ended.stages[-1] if ended.stages else "start"] += 1
    if ended.code != 3 or "Traceback" in ended.said or "UnavailableError: " not in ended.said:
        found.wrong.append(f"{name}: exit code {ended.code}: {ended.said[-1500:]}")
    if (place / "out").exists() and (half := unsound(place / "out")):
        found.wrong.append(f"{name}: half-written: {half}")


def full_disk(place: Path, stages: list[str], peak: int, chance: random.Random) -> Ended:
    """No more than a share of what the run needs fits on the disk."""
    resize(place, max(PAGE, int(peak * chance.random()) // PAGE * PAGE))
    ended = command([*RUN, str(place / "out")])
    resize(place, PLENTY)
    return ended


def full_temporary(place: Path, stages: list[str], peak: int, chance: random.Random) -> Ended:
    """TMPDIR names a disk with next to nothing left."""
    with disk(place.with_name("temporary"), PAGE * chance.randint(1, 40)) as scratch:
        return command([*RUN, str(place / "out")], {"TMPDIR": str(scratch)})


def short_files(place: Path, stages: list[str], peak: int, chance: random.Random) -> Ended:
    """No file may grow beyond a limit (ulimit -f)."""
    limit = int(2 ** chance.uniform(8, 20))

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    return command([*RUN, str(place / "out")], prepare=prepare)


def read_only_disk(place: Path, stages: list[str], peak: int, chance: random.Random) -> Ended:
    """From the begin of a stage on, or from before the run, the disk is mounted read-only."""
    covered = []

    def cover() -> None:
        mount("--bind", str(place), str(place))
        mount("-o", "remount,bind,ro", str(place))
        covered.append(place)

    ended = _from_stage(place, chance.randrange(len(stages) + 1), cover)
    for path in covered:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
    return ended


def no_permission(place: Path, stages: list[str], peak: int, chance: random.Random) -> Ended:
    """From the begin of a stage on, the directory of the run may not be written."""
    target = place / "out.work"

    def forbid() -> None:
        (target if target.exists() else place).chmod(0o555)

    ended = _from_stage(place, chance.randrange(len(stages) + 1), forbid)
    for path in (place, target):
        if path.exists():
            path.chmod(0o755)
    return ended


def unreadable_stage(place: Path, stages: list[str], peak: int, chance: random.Random) -> Ended:
    """A run is stopped, and what it has made may not be read when it is resumed."""
    closed = []

    def close() -> None:
        for stage in sorted((place / "out.work").iterdir()):
            if stage.is_dir() and not stage.name.startswith("."):
                file = chance.choice(sorted(path for path in stage.rglob("*") if path.is_file()))
                closed.append(file)
        raise KeyboardInterrupt

    _from_stage(place, chance.randrange(2, len(stages) + 1), close)
    for file in closed:
        file.chmod(0)
    ended = command([*RUN, str(place / "out")])
    for file in closed:
        if file.exists():
            file.chmod(0o644)
    return ended


def _from_stage(place: Path, number: int, act: Callable[[], None]) -> Ended:
    """Run, and `act` at the begin of stage `number`; 0 is before the run."""
    if number == 0:
        act()
        return command([*RUN, str(place / "out")])

    def begun(count: int) -> None:
        if count == number:
            act()

    return command([*RUN, str(place / "out")], begun=begun)


def writers(found: Trouble, whole: Path, room: Path) -> None:
    """Every other command that writes: on a full disk and on a read-only one it says so and leaves nothing."""
    key, heads = room / "key.pem", room / "heads.json"
    heads.write_text('{"0": [0]}')
    subprocess.run(
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key)],
        check=True,
        capture_output=True,
    )
    model, path = SETTINGS[0].partition("=")[2], str(whole / "path.safetensors")
    commands: dict[str, list[str]] = {
        "search": ["search", model, "--task", "image-classification", "--data", "digits:train",
                   "--examples", "64", "--stages", "", "-o", "DISK/path.safetensors"],
        "export": ["export", path, "--sparsity", ".3", "--no-bench", "-o", "DISK/bundle"],
        "report": ["report", str(whole), "-o", "DISK/report.html"],
        "pictures": ["report", str(whole), "-o", str(room / "r.html"), "--png", "DISK/pictures"],
        "triton": ["triton", str(whole), "-o", "DISK/repository"],
        "junit": ["gate", str(whole), "--max-bytes", "1GB", "--no-verify", "--junit", "DISK/gate.xml"],
        "markdown": ["gate", str(whole), "--max-bytes", "1GB", "--no-verify", "--markdown", "DISK/gate.md"],
        "bench": ["bench", str(whole / "models/s50.onnx"), "--seconds", "0.1", "-o", "DISK/bench.json"],
        "plot": ["plot", "widths", str(whole), "-o", "DISK/widths.png"],
        "layers": ["inspect", path, "--at", ".3", "--plot", "DISK/layers.png"],
        "plan": ["plan", "import", str(heads), "--model", model, "-o", "DISK/plan.json"],
        "log": ["--log-file", "DISK/log.txt", "report", str(whole), "-o", str(room / "r.html")],
        "sign": ["sign", "DISK/signed", "--key", str(key)],
    }  # fmt: skip
    for name, words in commands.items():
        for state in ("full", "read-only"):
            with disk(room / "disk", PLENTY) as place:
                if name == "sign":
                    shutil.copytree(whole, place / "signed")
                before = _files(place)
                if state == "full":
                    resize(place, used(place) + PAGE)
                    (place / "filling").write_bytes(bytes(PAGE))
                else:
                    mount("-o", "remount,ro", str(place))
                ended = command([word.replace("DISK", str(place)) for word in words])
                left = [name for name in _files(place) if name not in (*before, "filling", "log.txt")]
                found.writers += 1
                if ended.code != 3 or "Traceback" in ended.said or "UnavailableError: " not in ended.said:
                    found.wrong.append(f"{name} {state}: exit code {ended.code}: {ended.said[-1500:]}")
                if left:
                    found.wrong.append(f"{name} {state}: left {left}")


def _files(place: Path) -> list[str]:
    return [str(path.relative_to(place)) for path in sorted(place.rglob("*")) if path.is_file()]


def command(
    words: list[str],
    environment: dict[str, str] | None = None,
    *,
    prepare: Callable[[], None] = lambda: None,
    begun: Callable[[int], None] = lambda count: None,
    watch: Callable[[], None] = lambda: None,
) -> Ended:
    """A command line in a process of its own. `begun` is told the number of every stage as it begins; where it raises
    KeyboardInterrupt the command is interrupted. `watch` is called all the time."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _child(words, environment or {}, write, prepare)
    os.close(write)
    said = b""
    stages: list[str] = []
    with open(read, "rb", buffering=0) as stream:
        while True:
            ready, _, _ = select.select([stream], [], [], 0.01)
            watch()
            if not ready:
                continue
            piece = stream.read(1 << 16)
            if not piece:
                break
            said += piece
            lines = said.decode(errors="replace").split("\n")[:-1]
            now = [line.removesuffix(" ...") for line in lines if line.endswith(" ...")]
            while len(stages) < len(now):
                stages.append(now[len(stages)])
                try:
                    begun(len(stages))
                except KeyboardInterrupt:
                    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), said.decode(errors="replace"), stages)


def _child(words: list[str], environment: dict[str, str], write: int, prepare: Callable[[], None]) -> None:
    code = 99
    try:
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.environ.update(environment)
        tempfile.tempdir = None  # as in a new process: TMPDIR is read again
        from deploy_prune.cli.main import run_command

        prepare()
        code = run_command(words)
        sys.stdout.flush()
    finally:
        os._exit(code)


@contextmanager
def disk(place: Path, size: int) -> Iterator[Path]:
    """A tmpfs of `size` bytes at `place`."""
    place.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(place))
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def resize(place: Path, size: int) -> None:
    mount("-o", f"remount,size={size}", str(place))


def used(place: Path) -> int:
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"cannot mount here: {done.stderr.strip()}")


if __name__ == "__main__":
    main()
