"""ONNX Runtime on an NVIDIA GPU, which either computes the whole model or is refused.

The refusals are tested; what runs on a GPU is checked by bench/gpu_suite.sh (docs/gpu.md).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bench.environment import gpu_name
from bench.runtimes.base import Runtime, Session
from bench.runtimes.cost import building
from bench.runtimes.cuda_graph import GraphSession
from bench.runtimes.ort import SILENT, OrtSession, absent, create, file_key
from bench.runtimes.ort_cpu import describe_options, session_options, thread_count
from bench.runtimes.placement import Placement
from converters.onnx_session import preload_cuda
from deploy_prune.errors import ArtifactError, DeployPruneError, UnavailableError
from deploy_prune.files import existing, scratch_directory

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "CUDAExecutionProvider"
PROVIDER_OPTIONS = {"device_id": "0"}  # the first device that CUDA_VISIBLE_DEVICES leaves
_partly: set[tuple[Any, ...]] = set()  # files that ORT does not give to the GPU whole; finding out takes a load


class OrtCuda(Runtime):
    """ONNX Runtime, CUDAExecutionProvider: inputs and outputs stay on the device, every call is synchronised."""

    name = "ort-cuda"
    graphs: ClassVar[bool] = False
    remedy = (
        "On a machine with an NVIDIA driver: pip uninstall -y onnxruntime; pip install 'deploy-prune[gpu]' "
        "(both packages fill the same folder, so only one may be installed)."
    )

    def available(self) -> str | None:
        return absent() or provider_missing() or provider_broken()

    def load(self, onnx_path: Path | str, *, threads: int | None = None) -> Session:
        if reason := provider_missing():
            raise UnavailableError(f"runtime {self.name} is not available here", got=reason, remedy=self.remedy)
        preload_cuda()
        path, count = existing(onnx_path, "ONNX file"), thread_count(threads)
        provider = {**PROVIDER_OPTIONS, **({"enable_cuda_graph": "1"} if self.graphs else {})}

        def session(*, strict: bool = False, profile: str | None = None) -> onnxruntime.InferenceSession:
            options = session_options(count)
            if strict:
                options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
                options.log_severity_level = SILENT
            if profile:
                options.enable_profiling, options.profile_file_prefix = True, profile
            return create(path, [(PROVIDER, PROVIDER_OPTIONS if profile else provider)], options)

        facts: dict[str, Any] = {
            "runtime": self.name,
            "device": gpu_name() or "unknown GPU",
            "options": describe_options(count),
            "provider_options": provider,
            "io_binding": "inputs and outputs on the device",
        }
        kind = GraphSession if self.graphs else OrtSession
        key = file_key(path)
        if key not in _partly:
            try:
                with building(facts):
                    loaded = session(strict=True)
                refuse_other_provider(path, loaded)
                return kind(path, loaded, device="cuda", facts={**facts, "placement": "every node on the GPU"})
            except ArtifactError:
                _partly.add(key)
        # Something would run on the host. ORT works out shapes there by design; whether it is only that is decided by
        # the placement of every node, at the first inputs.
        with building(facts):
            loaded = session()
        refuse_other_provider(path, loaded)
        return kind(
            path,
            loaded,
            device="cuda",
            facts=facts,
            profiled=lambda prefix: session(profile=prefix),
            check=lambda placement: refuse_host_nodes(path, placement),
        )


class OrtCudaGraph(OrtCuda):
    """The same, with all its kernels recorded once as a CUDA graph and replayed by every call: one launch instead of
    one per node. Sizes are fixed when inputs are bound."""

    name = "ort-cuda-graph"
    graphs = True


def refuse_other_provider(path: Path, session: onnxruntime.InferenceSession) -> None:
    """Raises UnavailableError when ORT made a session without the CUDA provider, which it does without an error."""
    if PROVIDER not in session.get_providers():
        raise UnavailableError(
            "ONNX Runtime put the model on the CPU although the GPU was asked for",
            where=path.name,
            expected=PROVIDER,
            got=", ".join(session.get_providers()),
            remedy=OrtCuda.remedy,
        )


def refuse_host_nodes(path: Path, placement: Placement) -> None:
    """Raises UnavailableError, naming the nodes, when part of the computation was left to the CPU."""
    strays = placement.elsewhere(PROVIDER)
    if strays or not placement.nodes:
        shown = [f"{node.name} ({node.op}): {node.provider}" for node in strays[:20]]
        more = [f"... and {len(strays) - 20} more"] if len(strays) > 20 else []
        raise UnavailableError(
            f"{len(strays)} of {len(placement.nodes)} nodes would not run on the GPU",
            where=path.name,
            problems=shown + more,
            expected=f"all but shape arithmetic on {PROVIDER}",
            remedy="This ONNX Runtime has no CUDA kernel for them: install a newer onnxruntime-gpu, or export with "
            "another opset or precision.",
        )


def provider_missing() -> str | None:
    """Why this onnxruntime has no CUDA provider, or None."""
    import onnxruntime

    if PROVIDER in onnxruntime.get_available_providers():
        return None
    return f"onnxruntime {onnxruntime.__version__} was built without {PROVIDER} (the CPU package is installed)"


def provider_broken() -> str | None:
    """Why the CUDA provider does not start here, or None."""
    why = why_not_started(PROVIDER)
    return f"the CUDA provider does not start; is a driver, CUDA or cuDNN missing? ({why})" if why else None


@functools.cache
def why_not_started(provider: str) -> str | None:
    """What ONNX Runtime says when a provider does not start here, or None; found out by a one-node model."""
    import onnx
    from onnx import TensorProto, helper

    preload_cuda()
    value = functools.partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT, shape=[1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", [value("x")], [value("y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with scratch_directory() as directory:
        path = directory / "probe.onnx"
        onnx.save(model, path)
        options = session_options(1)
        options.log_severity_level = SILENT
        try:
            made = create(path, [(provider, PROVIDER_OPTIONS)], options).get_providers()
        except DeployPruneError as error:
            return error.got or error.what
    return None if provider in made else f"it made a session for {', '.join(made)}"
