"""An ONNX Runtime session that replays CUDA graphs: one is recorded for each set of bound inputs, and lives as long as
the session.

A graph reads and writes the addresses it was recorded with, so outputs are bound to memory of their exact size first.
That a replay computes is proved once per recording: the outputs are overwritten, and must come out again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.runtimes.base import Bound
from bench.runtimes.ort import OrtSession
from deploy_prune.errors import UnavailableError

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

UNRECORDED = -1  # ONNX Runtime's id of a run that neither records nor replays
AGREES = 1e-3  # of the largest value; the kernels are the same


class GraphSession(OrtSession):
    """`bind` records; `run` records too, and gives the outputs of the first replay."""

    def __init__(self, path: Path, session: onnxruntime.InferenceSession, **rest: Any) -> None:
        super().__init__(path, session, **rest)
        self._recorded = 0

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return self.bind(inputs).outputs()

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Bound:
        import onnxruntime

        self._prepare(inputs)
        with self._refusals(inputs):
            values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(a, self._device, 0) for n, a in inputs.items()}
            binding = self._session.io_binding()
            for name, value in values.items():
                binding.bind_ortvalue_input(name, value)
            names = [output.name for output in self._session.get_outputs()]
            for name in names:
                binding.bind_output(name, self._device, 0)
            binding.synchronize_inputs()
            self._session.run_with_iobinding(binding, _graph(UNRECORDED))
            binding.synchronize_outputs()
            first = binding.get_outputs()
            expected = [value.numpy() for value in first]
            places = [
                onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                    value.shape(), _element(value.data_type()), self._device, 0
                )
                for value in first
            ]
            binding.clear_binding_outputs()
            for name, place in zip(names, places, strict=True):
                binding.bind_ortvalue_output(name, place)
            self._recorded += 1
            bound = _Replayed(self._session, binding, (values, places), _graph(self._recorded))
            bound()  # records
            for place, value in zip(places, expected, strict=True):
                place.update_inplace((value + 1).astype(value.dtype))  # anything but the answer
            bound()
            found = bound.outputs()
        if off := [name for name, a, b in zip(names, expected, found, strict=True) if not _close(a, b)]:
            raise UnavailableError(
                "a replayed CUDA graph does not compute what the model computes",
                where=self.name,
                problems=off,
                expected=f"the outputs of a plain run within {AGREES:g}",
                remedy="Time it with ort-cuda.",
            )
        return bound


class _Replayed(Bound):
    def __init__(self, session: Any, binding: Any, values: Any, options: onnxruntime.RunOptions) -> None:
        self._session, self._binding, self._values, self._options = session, binding, values, options

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding, self._options)
        self._binding.synchronize_outputs()

    def outputs(self) -> list[np.ndarray]:
        return list(self._binding.copy_outputs_to_cpu())


def _close(expected: np.ndarray, found: np.ndarray) -> bool:
    import numpy as np

    largest = float(np.abs(expected).max(initial=0))
    return bool(np.allclose(found, expected, rtol=0, atol=AGREES * largest, equal_nan=True))


def _graph(number: int) -> onnxruntime.RunOptions:
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options


def _element(kind: str) -> Any:
    """`tensor(float16)` -> numpy's type of that name, which ONNX Runtime asks for."""
    import numpy as np

    return np.dtype({"float": "float32", "double": "float64"}.get(kind[7:-1], kind[7:-1])).type
