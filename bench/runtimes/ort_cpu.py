"""ONNX Runtime on the CPU provider, with every option that moves a timing set on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.environment import cores, cpu_model
from bench.runtimes.base import Runtime, Session
from bench.runtimes.cost import building
from bench.runtimes.ort import OrtSession, absent, create
from deploy_prune.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "CPUExecutionProvider"

CONFIG = {
    # Workers poll for the next operator while a run lasts: ORT's default, and what a server under load sees.
    "session.intra_op.allow_spinning": "1",
    # ... but stop when the run ends. Otherwise the workers of the model that ran last go on polling and take
    # cores from the model that runs next, and interleaved models are timed against each other's leftovers.
    "session.force_spinning_stop": "1",
}


class OrtCpu(Runtime):
    """ONNX Runtime, CPUExecutionProvider: one operator at a time, `threads` threads inside it, no core affinity."""

    name = "ort-cpu"
    on_cpu = True
    remedy = "pip install 'deploy-prune[cpu]'"

    def available(self) -> str | None:
        return absent()

    def load(self, onnx_path: Path | str, *, threads: int | None = None) -> Session:
        path, count = Path(onnx_path), thread_count(threads)
        facts: dict[str, Any] = {"runtime": self.name, "device": cpu_model(), "options": describe_options(count)}
        with building(facts):
            session = create(path, [(PROVIDER, {})], session_options(count))
        if session.get_providers() != [PROVIDER]:
            raise UnavailableError(
                "the model was not given to the CPU provider",
                where=path.name,
                expected=PROVIDER,
                got=", ".join(session.get_providers()),
            )
        return OrtSession(path, session, device="cpu", facts=facts)


def thread_count(threads: int | None) -> int:
    """The asked number of threads, or every physical core this process may use. Raises UsageError below 1."""
    if threads is None:
        return cores().usable
    if threads < 1:
        raise UsageError("a model needs at least one thread", expected="threads >= 1", got=str(threads))
    return threads


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """The options `describe_options` states."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    for key, value in CONFIG.items():
        options.add_session_config_entry(key, value)
    return options


def describe_options(threads: int) -> dict[str, Any]:
    """Every option `session_options` sets, as JSON; the rest are ORT's defaults."""
    return {
        "intra_op_num_threads": threads,
        "inter_op_num_threads": 1,
        "execution_mode": "sequential",
        "graph_optimization_level": "all",
        **CONFIG,
    }
