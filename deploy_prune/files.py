"""Files are whole or absent: everything is written under a temporary name and renamed when complete."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy_prune.errors import ArtifactError, UnavailableError, UsageError

TEMPORARY = ".partial-"  # a killed writer leaves at most names that start so; nothing reads them
_CHUNK = 1 << 20
_DEEPEST = 100  # levels of JSON; what we write has under 20


def _write_failure(path: Path, error: Exception) -> OSError | None:
    """`error` as the failure to write `path` that it is; None when the block failed for another reason, such as reading
    its input. Libraries written in Rust (safetensors) wrap the operating system's error in their own type."""
    import errno

    if not isinstance(error, OSError):
        wrapped = re.search(r"\(os error (\d+)\)$", str(error))
        if wrapped is None:
            return None
        error = OSError(int(wrapped[1]), os.strerror(int(wrapped[1])))
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO):
        return error
    given = (error.filename, error.filename2)
    names = [Path(name).absolute() for name in given if isinstance(name, (str, os.PathLike))]
    return error if any(path.parent.absolute() in (name, *name.parents) for name in names) else None


def _write_failed(path: Path, error: OSError) -> UnavailableError:
    import errno

    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    free = ""
    with contextlib.suppress(OSError):
        free = f"{shutil.disk_usage(path.parent).free / 2**20:.0f} MiB free"
    return UnavailableError(
        "no space left on the device while writing" if full else f"cannot write ({error.strerror or error})",
        where=str(path),
        got=free or None,
        remedy="Free some space or choose another output directory; nothing half-written was kept, "
        "and `--resume` goes on from the last whole stage.",
    )


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Failures to write `path` as UnavailableError; others as they are."""
    try:
        yield
    except Exception as error:
        failure = _write_failure(path, error)
        if failure is None:
            raise
        raise _write_failed(path, failure) from error


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; rename it to `path` when the block ends well, delete it otherwise.

    Raises UnavailableError when the disk is full or the directory cannot be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        with _explained(path):  # before the clean-up frees space
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix="-" + path.name, dir=path.parent)
            os.close(handle)
            temporary = Path(name)
            yield temporary
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp and some writers make files that only their owner may read
            _sync(temporary)
            os.replace(temporary, path)
            temporary = None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: Path | str) -> Iterator[Path]:
    """As `atomic_file`, for a directory; an existing `path` is replaced only when the new one is whole."""
    path = Path(path)
    temporary: Path | None = None
    try:
        with _explained(path):  # before the clean-up frees space
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, suffix="-" + path.name, dir=path.parent))
            os.chmod(temporary, 0o777 & ~_umask())
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    os.chmod(file, 0o666 & ~_umask())
                    _sync(file)
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=TEMPORARY, suffix="-old", dir=path.parent))
                os.rename(path, old / path.name)
                os.rename(temporary, path)
                shutil.rmtree(old)
            else:
                os.rename(temporary, path)
            temporary = None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_siblings(path: Path | str) -> Iterator[Path]:
    """As `atomic_file`, for a file that others lie beside: yield `path`'s name in a temporary directory; when the block
    ends well all that was written there goes beside `path`, which comes last."""
    path = Path(path)
    room: Path | None = None
    try:
        with _explained(path):  # before the clean-up frees space
            path.parent.mkdir(parents=True, exist_ok=True)
            room = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
            yield room / path.name
            for file in sorted(room.iterdir(), key=lambda f: f.name == path.name):
                _sync(file)
                os.replace(file, path.parent / file.name)
    finally:
        if room is not None:
            shutil.rmtree(room, ignore_errors=True)


@contextlib.contextmanager
def scratch_directory(needs: int = 1 << 16) -> Iterator[Path]:
    """A temporary directory, deleted at the end. Libraries write there and word a full disk in ways of their own: where
    the block fails and the directory does not take `needs` bytes more, that is what is raised, UnavailableError."""
    try:
        directory = Path(tempfile.mkdtemp(prefix="deploy-prune-"))
    except OSError as error:  # also where Python finds no directory at all that takes a file
        raise _write_failed(Path(error.filename or os.environ.get("TMPDIR") or "/tmp"), error) from error
    try:
        yield directory
    except Exception as error:
        probe = directory / "probe"
        try:
            probe.write_bytes(bytes(needs))
        except OSError as full:
            raise _write_failed(probe, full) from error
        raise
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def write_json(path: Path | str, data: Any) -> None:
    """Write `data` as sorted, indented JSON, atomically: the same data is always the same bytes."""
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path | str, *, limit: int = 256 * 2**20) -> Any:
    """Parse a JSON file; raises UnavailableError when it is missing, ArtifactError when it is not JSON."""
    path = existing_file(path)
    if not path.is_file():  # reading a pipe or device could last for ever
        raise ArtifactError("not a plain file", where=str(path), remedy="This is not a file deploy-prune wrote.")
    if path.stat().st_size > limit:
        raise ArtifactError(
            "JSON file is too large",
            where=str(path),
            expected=f"at most {limit} bytes",
            got=f"{path.stat().st_size} bytes",
            remedy="This is not a file deploy-prune wrote.",
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if _depth_exceeds(data, _DEEPEST):
            raise ValueError(f"nested more than {_DEEPEST} deep")
        return data
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            "not valid JSON", where=str(path), got=str(error)[:200], remedy="The file is damaged; write it again."
        ) from error


def _depth_exceeds(data: Any, most: int) -> bool:
    """Whether lists and objects lie more than `most` deep in each other; who walks data by recursion relies on it."""
    level: list[Any] = [data]
    for _ in range(most):
        boxes = [box.values() if isinstance(box, dict) else box for box in level if isinstance(box, (dict, list))]
        level = [inner for box in boxes for inner in box if isinstance(inner, (dict, list))]
        if not level:
            return False
    return True


def existing(path: Path | str, what: str = "file") -> Path:
    """`path` as a Path; raises UnavailableError, naming the nearest existing parent, when nothing is there."""
    path = Path(path)
    if path.exists():
        return path
    parent = next((p for p in path.parents if p.exists()), Path("."))
    raise UnavailableError(
        f"no such {what}",
        where=str(path),
        got=f"nearest existing directory is {parent}",
        remedy="Check the spelling and the directory that a relative name starts from; real data is found by "
        "DEPLOY_PRUNE_DATA.",
    )


def existing_file(path: Path | str, what: str = "file") -> Path:
    """As `existing`, for something to be read; raises UsageError for a directory, UnavailableError where it may not be
    read."""
    path = existing(path, what)
    if path.is_dir():
        raise UsageError("a directory is in the place of a file", where=str(path), expected=what)
    if not os.access(path, os.R_OK):
        raise _unreadable(path)
    return path


def _unreadable(path: Path | str) -> UnavailableError:
    return UnavailableError(
        "the file may not be read", where=str(path), remedy="Give yourself the right to read it (chmod u+r)."
    )


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes. Raises UnavailableError when it may not be read."""
    digest = hashlib.sha256()
    try:
        stream = open(path, "rb")  # noqa: SIM115 - closed below
    except PermissionError as error:
        raise _unreadable(path) from error
    with stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def remove_partial(directory: Path) -> None:
    """Delete what killed writers left directly inside `directory`."""
    for leftover in directory.glob(TEMPORARY + "*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
