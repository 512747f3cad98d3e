"""ONNX Runtime with TensorRT on an NVIDIA GPU; nodes TensorRT does not take run on CUDA, none on the CPU.

Written from ONNX Runtime's documentation; not yet run on a GPU by this project's tests, which test the refusals.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.environment import gpu_name
from bench.runtimes.base import Runtime, Session
from bench.runtimes.cost import building
from bench.runtimes.ort import OrtSession, absent, create
from bench.runtimes.ort_cpu import describe_options, session_options, thread_count
from bench.runtimes.ort_cuda import PROVIDER as CUDA
from bench.runtimes.ort_cuda import PROVIDER_OPTIONS as CUDA_OPTIONS
from bench.runtimes.ort_cuda import provider_broken, why_not_started
from bench.runtimes.placement import Placement
from converters.onnx_session import preload_cuda
from deploy_prune.errors import UnavailableError

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "TensorrtExecutionProvider"
OPTIONS = {"device_id": "0", "trt_fp16_enable": "0", "trt_engine_cache_enable": "0"}  # a cached engine hides build time


class OrtTensorrt(Runtime):
    """ONNX Runtime, TensorrtExecutionProvider before CUDAExecutionProvider; engines are built at the first call."""

    name = "ort-tensorrt"
    one_shape = True
    remedy = (
        "On a machine with an NVIDIA driver: pip uninstall -y onnxruntime; pip install 'deploy-prune[gpu]' tensorrt "
        "(TensorRT's libraries must be of the version this onnxruntime-gpu was built for)."
    )

    def available(self) -> str | None:
        reason = absent() or provider_missing() or provider_broken()
        if reason is None and (why := why_not_started(PROVIDER)):
            reason = f"TensorRT does not start; are its libraries missing? ({why})"
        return reason

    def load(self, onnx_path: Path | str, *, threads: int | None = None) -> Session:
        if reason := absent() or provider_missing():
            raise UnavailableError(f"runtime {self.name} is not available here", got=reason, remedy=self.remedy)
        preload_cuda()
        path, count = Path(onnx_path), thread_count(threads)

        def session(profile: str | None = None) -> onnxruntime.InferenceSession:
            options = session_options(count)
            if profile:
                options.enable_profiling, options.profile_file_prefix = True, profile
            return create(path, [(PROVIDER, OPTIONS), (CUDA, CUDA_OPTIONS)], options)

        facts: dict[str, Any] = {
            "runtime": self.name,
            "device": gpu_name() or "unknown GPU",
            "options": describe_options(count),
            "provider_options": OPTIONS,
            "io_binding": "inputs and outputs on the device",
        }
        with building(facts):
            loaded = session()
        if PROVIDER not in loaded.get_providers():
            raise UnavailableError(
                "ONNX Runtime made a session without TensorRT although it was asked for",
                where=path.name,
                expected=PROVIDER,
                got=", ".join(loaded.get_providers()),
                remedy=self.remedy,
            )
        return OrtSession(
            path,
            loaded,
            device="cuda",
            facts=facts,
            profiled=session,
            check=lambda placement: refuse_strays(path, placement),
        )


def refuse_strays(path: Path, placement: Placement) -> None:
    """Raises UnavailableError when nodes would run on the CPU, or none in TensorRT."""
    strays = [node for node in placement.elsewhere(PROVIDER) if node.provider != CUDA]
    taken = sum(node.provider == PROVIDER for node in placement.nodes)
    if strays or not taken:
        shown = [f"{node.name} ({node.op}): {node.provider}" for node in strays[:20]]
        raise UnavailableError(
            f"{len(strays)} nodes would run on the CPU and {taken} in TensorRT",
            where=path.name,
            problems=shown,
            expected=f"all but shape arithmetic on {PROVIDER} and {CUDA}",
            remedy="Export the standard variant: TensorRT knows no operators of ONNX Runtime's own.",
        )


def provider_missing() -> str | None:
    """Why this onnxruntime has no TensorRT provider, or None."""
    import onnxruntime

    if PROVIDER in onnxruntime.get_available_providers():
        return None
    return f"onnxruntime {onnxruntime.__version__} was built without {PROVIDER}, or the CPU package is installed"
