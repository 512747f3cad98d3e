"""OpenVINO on the CPU, with every option that moves a timing set on purpose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.runtimes.base import Bound, Runtime, Session, called
from bench.runtimes.cost import affinity, building
from bench.runtimes.ort_cpu import thread_count
from deploy_prune.errors import ArtifactError, UnavailableError, UsageError
from deploy_prune.files import existing

if TYPE_CHECKING:
    import numpy as np

DEVICE = "CPU"
TYPES = {"f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32", "boolean": "bool"}


def options_of(threads: int) -> dict[str, Any]:
    """Latency of one request at a time; fp32 stays fp32 (on CPUs with bf16 OpenVINO would round by itself); no pinning,
    as several models share the cores in one comparison."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }


class OpenVino(Runtime):
    """OpenVINO's CPU plugin, which computes the whole model or refuses it."""

    name = "openvino"
    on_cpu = True
    remedy = "pip install 'deploy-prune[openvino]'"

    def available(self) -> str | None:
        try:
            import openvino
        except ImportError as error:
            return f"openvino cannot be imported ({error})"
        devices = openvino.Core().available_devices
        return None if DEVICE in devices else f"openvino has no {DEVICE} device, only {', '.join(devices) or 'none'}"

    def load(self, onnx_path: Path | str, *, threads: int | None = None) -> Session:
        if reason := self.available():
            raise UnavailableError(f"runtime {self.name} is not available here", got=reason, remedy=self.remedy)
        import openvino

        path, count = existing(onnx_path, "ONNX file"), thread_count(threads)
        core = openvino.Core()
        facts: dict[str, Any] = {
            "runtime": self.name,
            "device": core.get_property(DEVICE, "FULL_DEVICE_NAME"),
            "version": openvino.__version__,
            "options": {**options_of(count), "affinity": affinity()},
        }
        try:
            with building(facts):
                compiled = core.compile_model(core.read_model(str(path)), DEVICE, options_of(count))
        except RuntimeError as error:
            raise ArtifactError(
                "OpenVINO cannot load this model",
                where=str(path),
                got=_reason(error),
                remedy="It reads standard ONNX operators; ONNX Runtime's own (com.microsoft) it mostly does not. "
                "Export with the standard variant.",
            ) from error
        devices = list(compiled.get_property("EXECUTION_DEVICES"))
        if devices != [DEVICE]:
            raise UnavailableError(
                "OpenVINO put the model elsewhere than asked", where=path.name, expected=DEVICE, got=", ".join(devices)
            )
        facts["placement"] = {f"{DEVICE} ({kind})": n for kind, n in sorted(_kernels(compiled).items())}
        return _OpenVinoSession(path, compiled, facts)


class _OpenVinoSession(Session):
    def __init__(self, path: Path, compiled: Any, facts: dict[str, Any]) -> None:
        self.name = called(path)
        self._compiled, self._facts = compiled, facts

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(port.get_any_name() for port in self._compiled.inputs)

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return self.bind(inputs).outputs()

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Bound:
        import numpy as np
        import openvino

        self.check_names(inputs)
        arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        request = self._compiled.create_infer_request()
        with self._refusals(inputs):
            for port in self._compiled.inputs:
                array = arrays[port.get_any_name()]
                wanted = TYPES.get(port.get_element_type().get_type_name(), "another type")
                if str(array.dtype) != wanted:
                    raise ValueError(f"{port.get_any_name()} takes {wanted}")
                request.set_tensor(port, openvino.Tensor(array, shared_memory=True))
            bound = _OpenVinoBound(request, len(self._compiled.outputs), arrays)
            with building(self._facts):  # kernels for these shapes are made at the first call
                bound()
        return bound

    def describe(self) -> dict[str, Any]:
        return dict(self._facts)

    @contextmanager
    def _refusals(self, inputs: Mapping[str, np.ndarray]) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in inputs.items())
            raise UsageError(
                "the model does not run on these inputs",
                where=self.name,
                got=f"{shapes}: {_reason(error)}",
                remedy="Choose a batch and sequence size the model was exported for.",
            ) from error


class _OpenVinoBound(Bound):
    def __init__(self, request: Any, outputs: int, arrays: Mapping[str, np.ndarray]) -> None:
        self._request, self._outputs, self._arrays = request, outputs, arrays  # the request reads the arrays in place

    def __call__(self) -> None:
        self._request.infer()

    def outputs(self) -> list[np.ndarray]:
        return [self._request.get_output_tensor(i).data.copy() for i in range(self._outputs)]


def _kernels(compiled: Any) -> Counter[str]:
    """How many nodes run by which kernel: {"brgemm_avx512_f32": 24, ...}; constants and parameters left out."""
    counts: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        told = node.get_rt_info()
        if str(told["layerType"].value) not in ("Const", "Input", "Output"):
            counts[str(told["primitiveType"].value)] += 1
    return counts


def _reason(error: Exception) -> str:
    """The line of OpenVINO's several that is not a place in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    own = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (own or lines or [type(error).__name__])[0][:300]
