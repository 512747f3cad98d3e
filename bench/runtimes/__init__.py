"""The runtimes a model can be timed on. To add one: a file with a `Runtime` and a line in `RUNTIMES`."""

from __future__ import annotations

from dataclasses import replace

from bench.runtimes.base import Bound, Runtime, Session
from bench.runtimes.openvino import OpenVino
from bench.runtimes.ort_cpu import OrtCpu
from bench.runtimes.ort_cuda import OrtCuda, OrtCudaGraph
from bench.runtimes.ort_tensorrt import OrtTensorrt
from bench.runtimes.torch_runtime import TorchCompile, TorchCpu, TorchCuda, TorchRuntime
from deploy_prune.errors import UnavailableError, UsageError, did_you_mean

__all__ = ["RUNTIMES", "Bound", "Runtime", "Session", "find_runtime", "get_runtime"]

RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        OrtCpu(),
        OrtCuda(),
        OrtCudaGraph(),
        OrtTensorrt(),
        OpenVino(),
        TorchCpu(),
        TorchCuda(),
        TorchCompile(),
    )
}


def find_runtime(name: str) -> Runtime:
    """The runtime of that name, whether or not it works here. Raises UsageError for an unknown name."""
    if name not in RUNTIMES:
        raise UsageError(f"no runtime {name!r}", remedy=did_you_mean(name, list(RUNTIMES)))
    return RUNTIMES[name]


def get_runtime(name: str, *, trust_code: bool = False) -> Runtime:
    """A runtime that works here; `trust_code` lets torch runtimes load checkpoints of `python:` models, which runs
    their code. Raises UsageError for an unknown name, UnavailableError for an absent runtime."""
    runtime = find_runtime(name)
    if trust_code and isinstance(runtime, TorchRuntime):
        runtime = replace(runtime, trust_code=True)
    if reason := runtime.available():
        raise UnavailableError(f"runtime {name} is not available here", got=reason, remedy=runtime.remedy)
    return runtime
