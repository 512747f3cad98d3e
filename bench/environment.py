"""What figures were measured on: hardware, its load, and software. No names of people, hosts or directories."""

from __future__ import annotations

import functools
import math
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "deploy-prune",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "torch",
    "timm",
    "transformers",
    "safetensors",
    "tokenizers",
    "onnxscript",
    "datasets",
    "scikit-learn",
    "pydantic",
    "click",
    "rich",
)
_SYS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Cores:
    """CPU this process may use. `Cores(logical=16, physical=8, quota=2.5)`: affinity allows 16 hardware threads on 8
    cores, of which the container's CPU quota pays for 2.5."""

    logical: int
    physical: int
    quota: float | None = None

    @property
    def usable(self) -> int:
        """Threads that can compute at full speed at once: physical cores, within the quota."""
        return max(1, min(self.physical, math.ceil(self.quota) if self.quota else self.physical))


def cores() -> Cores:
    """Where affinity or topology cannot be read, every logical CPU counts as a core."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # only Linux has it
        count = os.cpu_count() or 1
        return Cores(count, count)
    places = {
        (_number(_SYS / f"cpu{cpu}/topology/physical_package_id", 0), _number(_SYS / f"cpu{cpu}/topology/core_id", cpu))
        for cpu in allowed
    }
    return Cores(len(allowed), len(places), _quota())


def cpu_model() -> str:
    """`AMD EPYC 9654 96-Core Processor`."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Gpu:
    name: str
    driver: str
    memory_mib: str
    uuid: str


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """NVIDIA GPUs as the driver's own tool lists them; empty where there is no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,driver_version,memory.total,uuid", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[field.strip() for field in line.split(",")] for line in answer.splitlines()]
    return tuple(Gpu(*row) for row in rows if len(row) == 4)


def gpu_name() -> str | None:
    """Name of the first GPU visible to CUDA; of all candidates when the order of unlike GPUs cannot be known."""
    found = gpus()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    named = [gpu.name for gpu in found if first.startswith("GPU-") and gpu.uuid.startswith(first)]
    return " or ".join(sorted(set(named or [gpu.name for gpu in found]))) or None


def memory_bytes() -> tuple[int, int] | None:
    """Main memory (total, available) as the kernel states it; None where it does not."""
    fields = dict(line.split(":", 1) for line in _read(Path("/proc/meminfo")).splitlines() if ":" in line)
    try:
        total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (KeyError, ValueError):
        return None
    return total, available


def package_versions() -> dict[str, str | None]:
    """Installed version of each package that bears on results, None when absent. Imports none of them."""
    return {package: _version(package) for package in PACKAGES}


def environment() -> dict[str, Any]:
    """All of the above as JSON, for reports and manifests."""
    core = cores()
    memory = memory_bytes()
    return {
        "cpu": {
            "model": cpu_model(),
            "logical": core.logical,
            "physical": core.physical,
            "quota": core.quota,
            "usable": core.usable,
        },
        "gpus": [{"name": gpu.name, "driver": gpu.driver, "memory_mib": gpu.memory_mib} for gpu in gpus()],
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "memory_gib": round(memory[0] / 2**30, 1) if memory else None,
        "os": _os_name(),
        "python": platform.python_version(),
        "packages": {name: version for name, version in package_versions().items() if version},
    }


def note_environment(known: dict[str, list[dict[str, Any]]], device: str) -> None:
    """Add this environment to those that made results on `device`, unless it is there, whatever the load."""
    here = environment()
    if all({**earlier, "load_average": None} != {**here, "load_average": None} for earlier in known.get(device, [])):
        known.setdefault(device, []).append(here)


@functools.cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _os_name() -> str:
    try:
        distribution = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        distribution = ""
    return " ".join(filter(None, (distribution, platform.system(), platform.release(), platform.machine())))


def _quota() -> float | None:
    """CPUs granted by a container's quota, from control groups version 2 or 1; None when unlimited."""
    limit, _, period = _read(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    if not period:
        limit = _read(Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")).strip()
        period = _read(Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))
    try:
        granted = int(limit) / int(period)
    except (ValueError, ZeroDivisionError):  # "max" or no file
        return None
    return granted if granted > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path, default: int) -> int:
    text = _read(path).strip()
    return int(text) if text.lstrip("-").isdigit() else default
