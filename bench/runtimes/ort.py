"""ONNX Runtime sessions on any execution provider: loading, IO binding, and failures in our words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.runtimes.base import Bound, Session, called
from bench.runtimes.placement import Placement, read_placement
from deploy_prune.errors import ArtifactError, UsageError
from deploy_prune.files import existing

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

SILENT = 4  # ORT's severity "fatal": for attempts whose failure is expected and reported by us
Check = Callable[[Placement], None]
_placements: dict[tuple[Any, ...], Placement] = {}


def absent() -> str | None:
    """Why onnxruntime itself cannot be used, or None."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        return f"onnxruntime cannot be imported ({error})"
    return None


def create(
    path: Path, providers: Sequence[tuple[str, dict[str, str]]], options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    """A session without ORT's own retry on the CPU. Raises UnavailableError for a missing file and ArtifactError
    for one that ORT cannot load."""
    import onnxruntime

    existing(path, "ONNX file")
    try:
        # Without enable_fallback=0, ORT answers a provider's failure by building a CPU session and printing to stdout.
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers), enable_fallback=0)
    except _ort_errors() as error:
        raise ArtifactError(
            "ONNX Runtime cannot load this model",
            where=str(path),
            got=_first_line(error),
            remedy="Is it a whole ONNX file, with its external data beside it? Write it again.",
        ) from error


def file_key(path: Path) -> tuple[Any, ...]:
    """What tells a file, as it is now, from every other."""
    state = path.stat()
    return (str(path.resolve()), state.st_mtime_ns, state.st_size)


class OrtSession(Session):
    """An ONNX Runtime session whose inputs and outputs live on `device` ("cpu" or "cuda").

    `check`, when given, is applied once, before the first run, to where ORT places every node.
    """

    def __init__(
        self,
        path: Path,
        session: onnxruntime.InferenceSession,
        *,
        device: str,
        facts: Mapping[str, Any],
        profiled: Callable[[str], onnxruntime.InferenceSession] | None = None,
        check: Check | None = None,
    ) -> None:
        self.name, self._path = called(path), path
        self._session, self._device, self._facts = session, device, dict(facts)
        self._profiled, self._check = profiled, check

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(i.name for i in self._session.get_inputs())

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        self._prepare(inputs)
        with self._refusals(inputs):
            return list(self._session.run(None, dict(inputs)))

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Bound:
        import onnxruntime

        self._prepare(inputs)
        with self._refusals(inputs):
            binding = self._session.io_binding()
            # For "cpu" these wrap the arrays without a copy; the values keep the arrays alive.
            values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(a, self._device, 0) for n, a in inputs.items()}
            for name, value in values.items():
                binding.bind_ortvalue_input(name, value)
            for output in self._session.get_outputs():
                binding.bind_output(output.name, self._device, 0)
            binding.synchronize_inputs()
            bound = _OrtBound(self._session, binding, values)
            bound()
        return bound

    def describe(self) -> dict[str, Any]:
        import onnxruntime

        return {**self._facts, "version": onnxruntime.__version__, "providers": list(self._session.get_providers())}

    def _prepare(self, inputs: Mapping[str, np.ndarray]) -> None:
        self.check_names(inputs)
        if self._profiled is not None and self._check is not None:
            with self._refusals(inputs):
                placement = self._placed(inputs)
            self._check(placement)
            self._facts["placement"] = placement.to_json()
            self._profiled = None

    def _placed(self, inputs: Mapping[str, np.ndarray]) -> Placement:
        """Found out once per process for a file and its provider: it takes loading the model again."""
        assert self._profiled is not None
        key = (*file_key(self._path), json.dumps(self._facts["provider_options"]))
        if key not in _placements:
            _placements[key] = read_placement(self._profiled, inputs)
        return _placements[key]

    @contextmanager
    def _refusals(self, inputs: Mapping[str, np.ndarray]) -> Iterator[None]:
        refusals: tuple[type[Exception], ...] = (*_ort_errors(), ValueError)
        try:
            yield
        except refusals as error:
            shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in inputs.items())
            raise UsageError(
                "the model does not run on these inputs",
                where=self.name,
                got=f"{shapes}: {_first_line(error)}",
                remedy="Choose sizes that the model takes: --batch and --seq, in recipes bench.batch and bench.seq.",
            ) from error


class _OrtBound(Bound):
    def __init__(self, session: Any, binding: Any, values: Mapping[str, Any]) -> None:
        self._session, self._binding, self._values = session, binding, values

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    def outputs(self) -> list[np.ndarray]:
        return list(self._binding.copy_outputs_to_cpu())


def _ort_errors() -> tuple[type[Exception], ...]:
    """ORT's exceptions; they share no base class below Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [e for e in vars(state).values() if isinstance(e, type) and issubclass(e, Exception)]
    return (*own, RuntimeError)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
