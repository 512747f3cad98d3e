"""What a session costs before its first timed call: seconds to build, and memory that stays taken."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def building(facts: dict[str, Any]) -> Iterator[None]:
    """Add to `facts` what the block took: "build_seconds", and "memory", by how much the process grew meanwhile.

    May enclose several blocks of one session; their figures add up. Memory that an earlier session freed is taken
    again without growth, so the figure of a process's first session is the one to believe.
    """
    before, began = resident_bytes(), time.perf_counter()
    yield
    seconds, grown = time.perf_counter() - began, max(0, resident_bytes() - before)
    known = facts.get("memory", {"growth_bytes": 0})
    facts["build_seconds"] = round(facts.get("build_seconds", 0.0) + seconds, 4)
    facts["memory"] = {"growth_bytes": known["growth_bytes"] + grown, "process_peak_bytes": peak_bytes()}


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the kernel does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """The most memory this process has had in RAM so far (getrusage counts KiB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def affinity() -> list[int] | None:
    """The logical CPUs that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
