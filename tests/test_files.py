"""What cannot be written or read ends in our words, naming the place (whole runs on full disks: bench.studies.disk)."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy_prune.errors import UnavailableError
from deploy_prune.files import atomic_dir, existing_file, scratch_directory, sha256_file


@contextmanager
def short_files(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes (ulimit -f); Python ignores the signal and gets EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_library_that_fails_where_nothing_more_fits_is_not_blamed() -> None:
    with (
        short_files(1000),
        pytest.raises(UnavailableError, match="cannot write") as raised,
        scratch_directory(needs=2000) as scratch,
    ):
        raise RuntimeError("Protobuf serialization failed.")
    assert str(scratch) in str(raised.value) and not scratch.exists()


def test_a_library_that_fails_with_room_left_is_the_failure() -> None:
    with pytest.raises(RuntimeError, match="of its own"), scratch_directory() as scratch:
        raise RuntimeError("of its own")
    assert not scratch.exists()


def test_a_directory_that_was_not_whole_leaves_nothing(tmp_path: Path) -> None:
    with (
        short_files(1000),
        pytest.raises(UnavailableError, match="nothing half-written"),
        atomic_dir(tmp_path / "d") as directory,
    ):
        (directory / "weights").write_bytes(bytes(2000))
    assert not any(tmp_path.iterdir())


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secret"
    file.write_text("x")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read everything
    with pytest.raises(UnavailableError, match=r"may not be read in .*secret"):
        existing_file(file)

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(UnavailableError, match=r"may not be read in .*secret"):
        sha256_file(file)
