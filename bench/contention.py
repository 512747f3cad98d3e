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


def between(before: Snapshot, after: Snapshot) -> dict[str, Any]:
    """What happened meanwhile, as JSON: `others_cores` is how many cores other processes used on average (null where
    the kernel does not say), `contended` whether that is above `BUSY`; the GPU's clocks, temperature and foreign
    processes before and after."""
    elapsed = max(1e-9, after.seconds - before.seconds)
    others = None
    if before.machine is not None and after.machine is not None:
        used = (after.machine - before.machine) - (after.own - before.own)
        others = round(max(0.0, used / elapsed), 2)
    gpu = {"before": before.gpu, "after": after.gpu} if before.gpu or after.gpu else None
    strangers = any((state or {}).get("other_processes", "0") != "0" for state in (before.gpu, after.gpu))
    return {
        "seconds": round(elapsed, 2),
        "others_cores": others,
        "contended": (others is not None and others > BUSY) or strangers,
        "gpu": gpu,
    }


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
