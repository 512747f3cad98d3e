"""torch itself as a runtime: the member's checkpoint, eager or compiled, on the CPU or a GPU.

The CUDA side was written from PyTorch's documentation and has not been run on a GPU by this project's tests; refusals
are tested.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bench.environment import cpu_model, gpu_name, gpus
from bench.runtimes.base import Bound, Runtime, Session, called
from bench.runtimes.cost import affinity, building
from bench.runtimes.ort_cpu import thread_count
from bench.runtimes.torch_forms import Function, TorchForm, torch_form
from deploy_prune.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class TorchRuntime(Runtime):
    """`trust_code` allows checkpoints of `python:` models, whose loading runs their code."""

    trust_code: bool = False
    name: ClassVar[str]
    remedy: ClassVar[str] = "Needs torch for this device and a bundle with checkpoints (export.checkpoints: true)."
    compiled: ClassVar[bool] = False

    def device(self) -> str:
        return "cpu"

    def available(self) -> str | None:
        return None if find_spec("torch") else "torch is not installed"

    def load(self, onnx_path: Path | str, *, threads: int | None = None) -> Session:
        import torch

        if reason := self.available() or (_unseen() if self.device() == "cuda" else None):
            raise UnavailableError(f"runtime {self.name} is not available here", got=reason, remedy=self.remedy)
        device, count = self.device(), thread_count(threads)
        facts: dict[str, Any] = {
            "runtime": self.name,
            "device": cpu_model() if device == "cpu" else gpu_name() or "unknown GPU",
            "placement": f"every operator on {device}",
            "options": {
                "threads": count,
                "interop_threads": torch.get_num_interop_threads(),
                "affinity": affinity(),
                "attention": "scaled_dot_product_attention where the model uses it",
                "dtype": "float32",
                "tf32": device == "cuda" and torch.backends.cuda.matmul.allow_tf32,
            },
        }
        with building(facts), _Threads(count):
            form = torch_form(onnx_path, trust_code=self.trust_code)
        facts["weights"] = form.weights
        return _TorchSession(form, facts, device, count, compiled=self.compiled)


class TorchCpu(TorchRuntime):
    """Eager, on the CPU."""

    name = "torch-cpu"
    on_cpu = True


class TorchCuda(TorchRuntime):
    """Eager, on the first GPU that CUDA_VISIBLE_DEVICES leaves; a call ends when the device has finished it."""

    name = "torch-cuda"
    remedy = (
        "On a machine with an NVIDIA driver: pip install torch, whose default build is for CUDA; and a bundle with "
        "checkpoints (export.checkpoints: true)."
    )

    def device(self) -> str:
        return "cuda"

    def available(self) -> str | None:
        return super().available() or _no_gpu()


class TorchCompile(TorchRuntime):
    """torch.compile by inductor: on a GPU with CUDA graphs, without one on the CPU. A break in the graph is refused."""

    name = "torch-compile"
    one_shape = True
    remedy = "Needs torch, a C++ compiler on the PATH, and a bundle with checkpoints (export.checkpoints: true)."
    compiled = True

    def device(self) -> str:
        return "cuda" if _no_gpu() is None else "cpu"

    def available(self) -> str | None:
        absent = super().available()
        if absent or self.device() == "cuda":
            return absent
        return None if any(map(shutil.which, ("g++", "clang++"))) else "no C++ compiler (g++ or clang++) on the PATH"


class _TorchSession(Session):
    def __init__(self, form: TorchForm, facts: dict[str, Any], device: str, threads: int, *, compiled: bool) -> None:
        from bench.inputs import graph_inputs

        self.name = called(form.onnx)
        self._form, self._facts, self._device, self._threads, self._compiled = form, facts, device, threads, compiled
        self._specs = {spec.name: spec for spec in graph_inputs(form.onnx)}
        self._function: Function | None = None

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(self._specs)

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return self.bind(inputs).outputs()

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Bound:
        import numpy as np
        import torch

        self.check_names(inputs)
        wrong = [
            f"{name}: {array.dtype}, the model takes {self._specs[name].dtype}"
            for name, array in inputs.items()
            if str(array.dtype) != self._specs[name].dtype
        ]
        if wrong:
            raise UsageError("the model does not run on these inputs", where=self.name, problems=wrong)
        if self._function is None:
            self._form.model.cpu()
            with _Threads(self._threads):
                self._function = self._form.function(inputs)
        function, model = self._function, self._form.model.to(self._device)
        tensors = {n: torch.from_numpy(np.ascontiguousarray(a)).to(self._device) for n, a in inputs.items()}

        def call(given: Mapping[str, Tensor]) -> Tensor:
            return function(model, given)

        if self._compiled:
            mode = "reduce-overhead" if self._device == "cuda" else "default"
            self._facts["options"] |= {"compile_mode": mode, "fullgraph": True, "dynamic": False}
            call = torch.compile(call, mode=mode, fullgraph=True, dynamic=False)
        bound = _TorchBound(call, tensors, self._device, self._threads)
        with building(self._facts):
            self._first_calls(bound, inputs)
        if self._device == "cuda":
            self._facts["memory"]["device_peak_bytes"] = torch.cuda.max_memory_allocated()
        return bound

    def describe(self) -> dict[str, Any]:
        import torch

        return {**self._facts, "version": torch.__version__}

    def _first_calls(self, bound: _TorchBound, inputs: Mapping[str, np.ndarray]) -> None:
        """Compile, and record CUDA graphs, which takes three calls."""
        import torch

        # Every session compiles the same function: torch would stop at the ninth.
        many = torch._dynamo.config.patch(recompile_limit=4096, accumulated_recompile_limit=4096)
        try:
            with many if self._compiled else nullcontext():
                for _ in range(3 if self._compiled else 1):
                    bound()
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UnavailableError(
                "torch.compile cannot take this model as one graph",
                where=self.name,
                got=(str(error).splitlines() or [type(error).__name__])[0][:300],
                remedy="Time it with torch-cpu or torch-cuda.",
            ) from error
        except (RuntimeError, IndexError, ValueError, AssertionError) as error:
            shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in inputs.items())
            raise UsageError(
                "the model does not run on these inputs",
                where=self.name,
                got=f"{shapes}: {(str(error).splitlines() or [''])[0][:300]}",
                remedy="Choose sizes that the model takes: --batch and --seq, in recipes bench.batch and bench.seq.",
            ) from error


class _TorchBound(Bound):
    def __init__(self, call: Any, tensors: Mapping[str, Tensor], device: str, threads: int) -> None:
        self._call, self._tensors, self._device, self._threads = call, tensors, device, _Threads(threads)
        self._last: Tensor | None = None

    def __call__(self) -> None:
        import torch

        with self._threads, torch.inference_mode():
            self._last = self._call(self._tensors)
        if self._device == "cuda":
            torch.cuda.synchronize()

    def outputs(self) -> list[np.ndarray]:
        if self._last is None:
            self()
        assert self._last is not None
        return [self._last.detach().float().cpu().numpy().copy()]


class _Threads:
    """torch computes on `count` threads meanwhile. That number is the process's: what runs later gets its own back, for
    its sums may depend on it. Held anew for every call of a session, at under a microsecond a call; not nestable."""

    def __init__(self, count: int) -> None:
        import torch

        self._count, self._get, self._set = count, torch.get_num_threads, torch.set_num_threads

    def __enter__(self) -> None:
        self._before = self._get()
        if self._before != self._count:
            self._set(self._count)

    def __exit__(self, *_: object) -> None:
        if self._before != self._count:
            self._set(self._before)


def _no_gpu() -> str | None:
    """By the driver's tool alone: torch takes seconds to import, and `doctor` asks every runtime."""
    return None if gpus() else "no NVIDIA driver answers"


def _unseen() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "there is a GPU, but torch sees no CUDA device"
