"""Who else used the machine while something was timed: CPU of other processes, and the state of the GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GPU_FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "utilization.gpu", "power.draw")
BUSY = 0.25  # of a core that others may use before a comparison is called contended


@dataclass(frozen=True)
class Snapshot:
    """One moment: seconds of CPU that the machine and this process have used so far, and the GPU's state."""

    seconds: float
    machine: float | None
    own: float
    gpu: dict[str, str] | None


def snapshot() -> Snapshot:
    return Snapshot(time.monotonic(), _machine_seconds(), time.process_time(), gpu_state())


def between(*spans: tuple[Snapshot, Snapshot]) -> dict[str, Any]:
    """What happened within these spans of time, as JSON: `others_cores` is how many cores other processes used on
    average (null where the kernel does not say), `contended` whether that is above `BUSY`; the GPU's clocks,
    temperature and foreign processes before the first and after the last."""
    elapsed = max(1e-9, sum(after.seconds - before.seconds for before, after in spans))
    used = [_used(before, after) for before, after in spans]
    known = [each for each in used if each is not None]
    others = round(max(0.0, sum(known) / elapsed), 2) if len(known) == len(used) else None
    first, last = spans[0][0].gpu, spans[-1][1].gpu
    strangers = any((moment.gpu or {}).get("other_processes", "0") != "0" for span in spans for moment in span)
    return {
        "seconds": round(elapsed, 2),
        "others_cores": others,
        "contended": (others is not None and others > BUSY) or strangers,
        "gpu": {"before": first, "after": last} if first or last else None,
    }


def _used(before: Snapshot, after: Snapshot) -> float | None:
    """CPU seconds of other processes; None where the kernel does not say."""
    if before.machine is None or after.machine is None:
        return None
    return (after.machine - before.machine) - (after.own - before.own)


def gpu_state() -> dict[str, str] | None:
    """Clocks, temperature, use and power of the first GPU by the driver's tool (NVML), and how many processes other
    than this one compute there; None where there is no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        told = _ask([tool, f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits", "--id=0"])
        pids = _ask([tool, "--query-compute-apps=pid", "--format=csv,noheader", "--id=0"]).split()
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in told.splitlines()[0].split(",")] if told.strip() else []
    if len(values) != len(GPU_FIELDS):
        return None
    others = sum(pid != str(os.getpid()) for pid in pids)
    return {**dict(zip(GPU_FIELDS, values, strict=True)), "other_processes": str(others)}


def _ask(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def _machine_seconds() -> float | None:
    """CPU seconds of all processes since boot, waiting and stolen time left out; None where there is no /proc."""
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, *_ = map(int, words[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
