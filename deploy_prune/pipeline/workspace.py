"""A workspace keeps the whole stages of a run beside its future output, so that a killed run can go on.

Every stage is a directory in `OUT.work/`, renamed there when whole, with the fingerprint of everything it was made
from. A stage is taken again only when the fingerprint is the same. `OUT` itself appears by one rename at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deploy_prune import distributed, interrupts
from deploy_prune.errors import ArtifactError, UnavailableError, UsageError
from deploy_prune.files import (
    TEMPORARY,
    atomic_dir,
    read_json,
    remove_partial,
    scratch_directory,
    sha256_file,
    write_json,
)

Mode = Literal["new", "resume", "fresh"]

_MARKER = "workspace.json"  # what says that a directory is a workspace of ours, and may be deleted
_RECORD = "stage.json"
_LOCK = "lock"
SAVED = ".saved"  # ending of the directory of a stage that is not whole yet


@dataclass(frozen=True)
class Stage:
    """A whole stage: its files lie in `directory`. `reused` when an earlier run made it; `seconds` is what it took."""

    name: str
    directory: Path
    fingerprint: str
    seconds: float
    reused: bool


def fingerprint(inputs: Any) -> str:
    """Hex SHA-256 of JSON data in canonical form."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Workspace:
    """The stages of the run that will become `out`. Make one with `open_workspace`."""

    def __init__(self, out: Path, directory: Path, note: Callable[[str], None] = lambda text: None) -> None:
        self.out, self.directory, self.note = out, directory, note
        self.stages: list[Stage] = []

    @property
    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds of every stage so far; of a reused one, what it took when it was made."""
        return {stage.name: stage.seconds for stage in self.stages}

    def stage(
        self, name: str, inputs: Mapping[str, Any], work: Callable[[Path], None], *, together: bool = False
    ) -> Stage:
        """The stage `name` made from `inputs`: an earlier whole one, or what `work(directory)` now writes.

        `inputs` is JSON data holding all that the result depends on, fingerprints of earlier stages included. The main
        process of the run does the work; if the work is done `together`, so do the others, whose files are dropped.
        """
        wanted = fingerprint({"stage": name, "inputs": inputs})
        directory = self.directory / name
        done = distributed.from_main(lambda: self._whole(name, directory, wanted))
        if done is not None:
            self.note(f"{name}: whole from an earlier run")
        else:
            self.note(f"{name} ...")
            if together and not distributed.is_main():
                with scratch_directory() as scratch:
                    work(scratch)
            done = distributed.from_main(lambda: self._make(name, directory, wanted, work))
        interrupts.check()
        self.stages.append(done)
        return done

    def saved(self, name: str) -> Path:
        """Where the work on a stage keeps what it has reached, for a killed run to go on from."""
        return self.directory / (name + SAVED)

    def forget(self, saved: Path) -> None:
        """Delete what the work on a stage kept: the stage is whole."""
        if distributed.is_main():
            shutil.rmtree(saved, ignore_errors=True)

    def finish(self, stage: Stage) -> None:
        """Make `stage`'s directory the output, replacing an earlier output of ours, and delete the workspace."""
        distributed.from_main(lambda: self._finish(stage))

    def _make(self, name: str, directory: Path, wanted: str, work: Callable[[Path], None]) -> Stage:
        started = time.monotonic()
        with atomic_dir(directory) as temporary:
            work(temporary)
            seconds = time.monotonic() - started
            record = {"fingerprint": wanted, "seconds": seconds, "files": _files(temporary)}
            write_json(temporary / _RECORD, record)
        return Stage(name, directory, wanted, seconds, reused=False)

    def _finish(self, stage: Stage) -> None:
        (stage.directory / _RECORD).unlink()
        if self.out.exists():
            os.rename(self.out, Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=self.directory)) / "old")
        os.rename(stage.directory, self.out)
        shutil.rmtree(self.directory)

    def _whole(self, name: str, directory: Path, wanted: str) -> Stage | None:
        if not (directory / _RECORD).is_file():
            return None
        try:
            record = read_json(directory / _RECORD)
            same = record["fingerprint"] == wanted and record["files"] == _files(directory)
            return Stage(name, directory, wanted, float(record["seconds"]), reused=True) if same else None
        except (ArtifactError, KeyError, TypeError):
            return None  # not whole: it is made again


@contextlib.contextmanager
def open_workspace(
    out: Path, mode: Mode, *, is_output: Callable[[Path], bool], note: Callable[[str], None] = lambda text: None
) -> Iterator[Workspace]:
    """The workspace `OUT.work` of `out`, locked against a second run; `note` is told of every stage.

    `is_output` tells whether a directory is an earlier output of ours, which "fresh" may replace; nothing else is ever
    deleted. Raises UsageError when something is in the way, UnavailableError when another run is at work or the place
    cannot be written.
    """
    directory = work_directory(out)
    lock = distributed.from_main(lambda: _occupy(out, directory, mode, is_output))
    try:
        yield Workspace(out, directory, note)
    finally:
        if distributed.is_main():
            os.close(lock)


@contextlib.contextmanager
def file_workspace(path: Path, mode: Mode) -> Iterator[Path]:
    """Where the making of the file `path` keeps what it has reached, `PATH.work/path.saved`; deleted when it is done,
    or has reached nothing. Raises as `open_workspace`.
    """
    directory = work_directory(path)
    lock = distributed.from_main(lambda: _occupy(path, directory, mode, lambda _: True, replace=True))
    saved = directory / ("path" + SAVED)
    done = False
    try:
        yield saved
        done = True
    finally:
        if distributed.is_main():
            if done or not saved.exists():
                shutil.rmtree(directory)
            os.close(lock)


def _occupy(out: Path, directory: Path, mode: Mode, is_output: Callable[[Path], bool], *, replace: bool = False) -> int:
    """Make the workspace this run's own; returns the lock, an open file."""
    refuse_foreign(out, directory, mode, is_output, replace=replace)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UnavailableError(
            "cannot write the output",
            where=str(directory),
            got=error.strerror,
            remedy="Choose another output directory.",
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        write_json(directory / _MARKER, {"_type": "deploy-prune workspace", "_version": 1, "out": out.name})
        remove_partial(directory)
        if mode == "fresh":
            for child in directory.iterdir():
                if child.is_dir():
                    shutil.rmtree(child)
    except BlockingIOError as error:
        os.close(lock)
        raise UnavailableError(
            "another run is writing this output",
            where=str(directory),
            remedy="Wait for it, or choose another output directory.",
        ) from error
    except BaseException:
        if [child.name for child in directory.iterdir()] == [_LOCK]:  # nothing of an earlier run: leave no trace
            with contextlib.suppress(OSError):
                shutil.rmtree(directory)
        os.close(lock)
        raise
    return lock


def discard(directory: Path) -> None:
    """Delete the workspace of an output that is complete (a run killed between its last two steps leaves one)."""
    if (directory / _MARKER).is_file():
        shutil.rmtree(directory)


def refuse_foreign_file(path: Path, load: Callable[[Path], Any], what: str) -> None:
    """Raise UsageError when `path` holds something that `load`, which reads what is to be written, refuses; an earlier
    `what` may go."""
    if not path.exists():
        return
    try:
        load(path)
    except ArtifactError as error:
        raise UsageError(
            "the output is taken",
            where=str(path),
            expected=f"nothing, or an earlier {what}",
            got="another file",
            remedy="Choose another file with -o; nothing was touched.",
        ) from error


def work_directory(out: Path) -> Path:
    """Where the stages of `out` are kept: beside it. Raises UsageError for an `out` that has no name, such as `.`."""
    if out.name in ("", ".."):
        raise UsageError(
            "the output needs a name of its own",
            got=str(out),
            expected="a directory such as runs/mine",
            remedy="Choose another output directory; nothing was touched.",
        )
    return out.with_name(out.name + ".work")


def refuse_foreign(
    out: Path, directory: Path, mode: Mode, is_output: Callable[[Path], bool], *, replace: bool = False
) -> None:
    """Raise UsageError when the output, or its work directory, holds what this project did not write, or may not
    replace in this `mode`; with `replace` an earlier output may be replaced in any."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not is_output(out):
            what = "a directory with other files" if out.is_dir() else "a file"
            raise UsageError(
                "the output is taken",
                where=str(out),
                expected="nothing, or a bundle of an earlier run",
                got=what,
                remedy="Choose another output directory; nothing was touched.",
            )
        if mode == "new" and not replace:
            raise UsageError(
                "the output exists already",
                where=str(out),
                got="a bundle of an earlier run",
                remedy="--fresh replaces it when the new one is whole; or choose another output directory.",
            )
    if not directory.exists() or not any(directory.iterdir()):
        return
    strangers = [c.name for c in directory.iterdir() if c.name != _LOCK and not c.name.startswith(TEMPORARY)]
    if strangers and not (directory / _MARKER).is_file():
        raise UsageError(
            "the workspace is taken",
            where=str(directory),
            expected="nothing, or stages of an earlier run",
            got="a directory with other files",
            remedy="Choose another output directory; nothing was touched.",
        )
    whole = sorted(record.parent.name for record in directory.glob(f"*/{_RECORD}"))
    begun = sorted(saved.name.removesuffix(SAVED) for saved in directory.glob(f"*{SAVED}"))
    if mode == "new" and (whole or begun):
        raise UsageError(
            "an earlier run was not finished",
            where=str(directory),
            got=f"whole stages: {', '.join(whole) or 'none'}; begun: {', '.join(begun) or 'none'}",
            remedy="--resume goes on from them, --fresh starts again.",
        )


def _files(directory: Path) -> dict[str, str]:
    """Relative name -> SHA-256 of every file of a stage but its record."""
    return {
        str(path.relative_to(directory)): sha256_file(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != _RECORD
    }
