"""Running an ONNX file, plainly, to see what it computes; how fast it does is for `bench`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deploy_prune.errors import ArtifactError, UnavailableError
from deploy_prune.files import existing

if TYPE_CHECKING:
    import numpy as np


Device = Literal["cpu", "cuda"]
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxSession:
    """One file, loaded by onnxruntime with its default graph optimisations: as users will run it."""

    def __init__(
        self,
        path: Path | str,
        *,
        threads: int | None = None,
        content: bytes | None = None,
        device: Device = "cpu",
    ) -> None:
        """`content`, where given, is loaded in place of what the file at `path` holds.

        Raises UnavailableError without onnxruntime, file or device, ArtifactError when onnxruntime refuses the model.
        """
        path = existing(path, "ONNX file")
        try:
            import onnxruntime
        except ImportError as error:
            raise UnavailableError(
                "onnxruntime is not installed", remedy="pip install 'deploy-prune[cpu]' (or [gpu])"
            ) from error
        options: Any = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; its warnings concern providers nobody asked for
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # torch computes beside it
        if threads is not None:
            options.intra_op_num_threads = threads
        provider = _PROVIDERS[device]
        if device == "cuda":
            if provider not in (there := onnxruntime.get_available_providers()):
                raise UnavailableError(
                    "this onnxruntime has no CUDA",
                    where=str(path),
                    expected=provider,
                    got=f"onnxruntime {onnxruntime.__version__} with {', '.join(there)}",
                    remedy="pip uninstall -y onnxruntime; pip install 'deploy-prune[gpu]', on a machine with an NVIDIA "
                    "driver.",
                )
            preload_cuda()
        with _explained("onnxruntime cannot load the model", path):
            # Its own fallback would print to stdout and go on with the CPU.
            self._session: Any = onnxruntime.InferenceSession(
                content or str(path), options, providers=[provider], enable_fallback=0
            )
        if provider not in self._session.get_providers():
            raise UnavailableError(
                "CUDA does not start in onnxruntime",
                where=str(path),
                expected=provider,
                got=", ".join(self._session.get_providers()),
                remedy="`deploy-prune doctor` says whether driver, CUDA or cuDNN is missing.",
            )
        self.path, self.device = path, device

    @property
    def inputs(self) -> list[tuple[str, str, list[int | str]]]:
        """(name, type, shape) of every input, for example ("images", "tensor(float)", ["batch", 3, 224, 224])."""
        return [(i.name, i.type, list(i.shape)) for i in self._session.get_inputs()]

    @property
    def outputs(self) -> list[tuple[str, str, list[int | str]]]:
        return [(o.name, o.type, list(o.shape)) for o in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The first output. Raises ArtifactError when onnxruntime cannot compute it."""
        return self.run_all(inputs)[0]

    def run_all(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Every output, in the graph's order. Raises as `run`."""
        with _explained("onnxruntime cannot run the model", self.path):
            return list(self._session.run(None, dict(inputs)))

    def run_values(self, inputs: Mapping[str, Any], read: str) -> dict[str, Any]:
        """Every output by name as an onnxruntime value, which another call takes as input without a copy: the output
        `read` on the CPU, the others on the session's device.

        `inputs` are such values, there or on the CPU. Raises as `run`.
        """
        with _explained("onnxruntime cannot run the model", self.path):
            binding = self._session.io_binding()
            for name, value in inputs.items():
                binding.bind_ortvalue_input(name, value)
            names = [output.name for output in self._session.get_outputs()]
            for name in names:
                binding.bind_output(name, "cpu" if name == read else self.device)
            self._session.run_with_iobinding(binding)
            found = dict(zip(names, binding.get_outputs(), strict=True))
            binding.clear_binding_inputs()  # values hold on to their binding, which would hold on to earlier caches
            return found

    @property
    def metadata(self) -> dict[str, str]:
        """The file's metadata properties."""
        return dict(self._session.get_modelmeta().custom_metadata_map)


def preload_cuda() -> None:
    """Load CUDA and cuDNN from the pip packages that the gpu extra installs; ORT 1.21 and later offer it."""
    import sys

    import onnxruntime

    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:
        with contextlib.redirect_stdout(sys.stderr):  # it prints; stdout belongs to results
            preload()


@contextlib.contextmanager
def _explained(what: str, path: Path) -> Iterator[None]:
    """Errors of onnxruntime, whose classes have no common base, and with bound values none of its own, as
    ArtifactError."""
    try:
        yield
    except Exception as error:
        if not (type(error).__module__.startswith("onnxruntime") or type(error) is RuntimeError):
            raise
        raise ArtifactError(
            what,
            where=str(path),
            got=str(error)[:400],
            remedy="The file is damaged, needs a newer onnxruntime, or was given what it does not take.",
        ) from error
