"""Runtimes run what they were asked to, where they were asked to, or refuse; inputs fit the graph they are made for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx_models import save_embedder, save_mlp

from bench import environment as env
from bench.inputs import GraphInput, graph_inputs, has_sequence, make_inputs
from bench.runtimes import RUNTIMES, find_runtime, get_runtime, ort_cuda
from bench.runtimes.ort import create
from bench.runtimes.ort_cpu import OrtCpu, session_options, thread_count
from bench.runtimes.placement import parse_profile, read_placement
from deploy_prune.errors import ArtifactError, UnavailableError, UsageError

X = {"x": np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)}
CUDA = "CUDAExecutionProvider"
has_cuda = CUDA in onnxruntime.get_available_providers()


@pytest.fixture
def mlp(tmp_path: Path) -> Path:
    return save_mlp(tmp_path / "dense.onnx")


@pytest.fixture
def claimed_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An onnxruntime that says it has CUDA and then builds CPU sessions, as one with a missing driver does."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    real = onnxruntime.InferenceSession

    def cpu_session(path: str, options: Any, providers: Any, **rest: Any) -> Any:
        return real(path, options, providers=["CPUExecutionProvider"], **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", cpu_session)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    ort_cuda.why_not_started.cache_clear()
    yield
    ort_cuda.why_not_started.cache_clear()


def test_unknown_runtime_suggests_the_closest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'ort-cuda'"):
        find_runtime("ort-cudda")


def test_runtimes_are_listed_under_their_own_names() -> None:
    assert all(runtime.name == name and runtime.remedy for name, runtime in RUNTIMES.items())


@pytest.mark.skipif(has_cuda, reason="this onnxruntime has the CUDA provider")
def test_absent_cuda_is_refused_with_the_extra_that_brings_it(mlp: Path) -> None:
    for attempt in (lambda: get_runtime("ort-cuda"), lambda: RUNTIMES["ort-cuda"].load(mlp)):
        with pytest.raises(UnavailableError, match=r"deploy-prune\[gpu\]") as caught:
            attempt()
        assert caught.value.exit_code == 3


@pytest.mark.usefixtures("claimed_cuda")
def test_cuda_that_does_not_start_is_not_available() -> None:
    with pytest.raises(UnavailableError, match="CUDA provider does not start"):
        get_runtime("ort-cuda")


@pytest.mark.usefixtures("claimed_cuda")
def test_session_that_silently_became_a_cpu_session_is_refused(mlp: Path) -> None:
    with pytest.raises(UnavailableError, match="on the CPU although the GPU was asked for") as caught:
        RUNTIMES["ort-cuda"].load(mlp)
    assert caught.value.got == "CPUExecutionProvider"


def test_absent_onnxruntime_is_refused_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UnavailableError, match=r"deploy-prune\[cpu\]"):
        get_runtime("ort-cpu")


def test_bound_call_computes_what_run_computes(mlp: Path) -> None:
    session = OrtCpu().load(mlp, threads=1)
    bound = session.bind(X)
    bound()
    assert np.array_equal(bound.outputs()[0], session.run(X)[0])
    assert np.abs(bound.outputs()[0]).max() > 0


def test_description_states_provider_version_and_every_option(mlp: Path) -> None:
    facts = OrtCpu().load(mlp, threads=1).describe()
    assert facts["providers"] == ["CPUExecutionProvider"]
    assert facts["version"] == onnxruntime.__version__
    assert facts["options"] == {
        "intra_op_num_threads": 1,
        "inter_op_num_threads": 1,
        "execution_mode": "sequential",
        "graph_optimization_level": "all",
        "session.intra_op.allow_spinning": "1",
        "session.force_spinning_stop": "1",
    }
    json.dumps(facts)


def test_described_options_are_the_ones_set() -> None:
    options = session_options(3)
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"y": X["x"]}, "expected: x"),
        ({}, "got: none"),
        ({"x": X["x"][:, :3]}, r"x float32\[2, 3\]"),
        ({"x": X["x"].astype(np.float64)}, r"x float64\[2, 4\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(mlp: Path, inputs: dict[str, np.ndarray], words: str) -> None:
    session = OrtCpu().load(mlp, threads=1)
    for attempt in (session.run, session.bind):
        with pytest.raises(UsageError, match=words):
            attempt(inputs)


def test_damaged_or_missing_file_is_refused(tmp_path: Path, mlp: Path) -> None:
    (tmp_path / "cut.onnx").write_bytes(mlp.read_bytes()[:-30])
    with pytest.raises(ArtifactError, match=r"cut\.onnx"):
        OrtCpu().load(tmp_path / "cut.onnx")
    with pytest.raises(UnavailableError, match=r"gone\.onnx"):
        OrtCpu().load(tmp_path / "gone.onnx")


def test_threads_default_to_the_usable_cores_and_must_be_positive() -> None:
    assert thread_count(None) == env.cores().usable
    assert thread_count(2) == 2
    with pytest.raises(UsageError):
        thread_count(0)


def test_nodes_left_on_the_cpu_are_named(mlp: Path) -> None:
    def profiled(prefix: str) -> Any:
        options = session_options(1)
        options.enable_profiling, options.profile_file_prefix = True, prefix
        return create(mlp, [("CPUExecutionProvider", {})], options)

    placement = read_placement(profiled, X)
    with pytest.raises(UnavailableError, match="nodes would not run on the GPU") as caught:
        ort_cuda.refuse_host_nodes(mlp, placement)
    assert any("up" in problem and "MatMul" in problem for problem in caught.value.problems)


def profile_event(name: str, op: str, provider: str, inputs: list[Any], outputs: list[Any]) -> dict[str, Any]:
    args = {
        "op_name": op,
        "provider": provider,
        "node_index": name,
        "input_type_shape": inputs,
        "output_type_shape": outputs,
    }
    return {"cat": "Node", "name": f"{name}_kernel_time", "args": args}


def test_shape_arithmetic_may_stay_on_the_host() -> None:
    host = "CPUExecutionProvider"
    events = [
        profile_event("s", "Shape", host, [{"float": [8, 3, 224, 224]}], [{"int64": [4]}]),
        profile_event("g", "Gather", host, [{"int64": [4]}, {"int64": []}], [{"int64": []}]),
        profile_event("c", "Sqrt", host, [{"float": []}], [{"float": []}]),
        profile_event("m", "MatMul", CUDA, [{"float": [8, 64]}, {"float": [64, 64]}], [{"float": [8, 64]}]),
        {"cat": "Session", "name": "model_run", "args": {}},
    ]
    placement = parse_profile(events)
    assert placement.elsewhere(CUDA) == ()
    assert placement.to_json() == {CUDA: 1, "CPUExecutionProvider (shapes)": 3}
    ort_cuda.refuse_host_nodes(Path("m.onnx"), placement)


@pytest.mark.parametrize(
    ("op", "inputs", "outputs"),
    [
        ("Add", [{"float": [8, 64]}], [{"float": [8, 64]}]),
        ("Gather", [{"float": [100, 64]}, {"int64": [1]}], [{"float": [1, 64]}]),
        ("Equal", [{"int64": [8, 128]}], [{"bool": [8, 128]}]),
        ("ReduceMax", [{"int64": [8, 128]}], [{"int64": []}]),
    ],
)
def test_computation_may_not_stay_on_the_host(op: str, inputs: list[Any], outputs: list[Any]) -> None:
    placement = parse_profile([profile_event("n", op, "CPUExecutionProvider", inputs, outputs)])
    assert [node.op for node in placement.elsewhere(CUDA)] == [op]


def test_profile_that_shows_no_node_proves_nothing() -> None:
    with pytest.raises(UnavailableError):
        ort_cuda.refuse_host_nodes(Path("m.onnx"), parse_profile([]))


# What goes in


def test_inputs_are_read_off_the_graph(tmp_path: Path) -> None:
    found = graph_inputs(save_embedder(tmp_path / "m.onnx", vocabulary=7))
    assert [(i.name, i.dtype, i.shape, i.rows) for i in found] == [
        ("input_ids", "int64", ("batch", "sequence"), 7),
        ("token_type_ids", "int64", ("batch", "sequence"), 2),
        ("attention_mask", "int64", ("batch", "sequence"), 0),
    ]
    assert has_sequence(found)


def test_made_up_inputs_have_the_asked_sizes_and_stay_in_the_vocabulary(tmp_path: Path) -> None:
    path = save_embedder(tmp_path / "m.onnx", vocabulary=3)
    made = make_inputs(graph_inputs(path), batch=2, sequence=50)
    assert {name: array.shape for name, array in made.items()} == dict.fromkeys(made, (2, 50))
    assert made["input_ids"].max() == 2
    assert (made["attention_mask"] == 1).all()
    assert OrtCpu().load(path, threads=1).run(made)[0].shape == (2, 50, 2)


def test_same_seed_makes_the_same_inputs(mlp: Path) -> None:
    specs = graph_inputs(mlp)
    assert np.array_equal(make_inputs(specs, batch=3, seed=1)["x"], make_inputs(specs, batch=3, seed=1)["x"])
    assert not np.array_equal(make_inputs(specs, batch=3, seed=1)["x"], make_inputs(specs, batch=3, seed=2)["x"])


@pytest.mark.parametrize(
    ("spec", "sizes", "words"),
    [
        (GraphInput("x", "float32", ("batch", 4)), {"batch": 0}, "batch size must be at least 1"),
        (GraphInput("x", "float32", ("batch", 4)), {"batch": 1, "sequence": 8}, "no input has a dynamic sequence"),
        (GraphInput("x", "float32", (1, 4)), {"batch": 8}, "fixed batch of 1, asked is 8"),
        (GraphInput("ids", "int64", ("batch", "sequence")), {"batch": 1}, "needs a sequence size"),
        (
            GraphInput("ids", "int64", ("batch", "sequence")),
            {"batch": 1, "sequence": 0},
            "size must be at least 1, got 0",
        ),
        (GraphInput("x", "float32", ("batch", 3, "height", 8)), {"batch": 1}, "dimension 2 \\(height\\)"),
        (GraphInput("x", "float32", (None, None)), {"batch": 1}, "dimension 1 \\(unnamed\\)"),
        (GraphInput("x", "float32", ()), {"batch": 1}, "scalar"),
    ],
)
def test_sizes_a_graph_cannot_take_are_refused(spec: GraphInput, sizes: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_inputs([spec], **sizes)  # type: ignore[arg-type]


def test_file_that_is_not_onnx_is_refused(tmp_path: Path) -> None:
    for name, content in (("text.onnx", b"hello, this is not a protobuf"), ("empty.onnx", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactError, match=name):
            graph_inputs(tmp_path / name)


# What it was measured on


def test_environment_is_json_and_names_no_person_host_or_directory() -> None:
    text = json.dumps(env.environment(), allow_nan=False)
    node = os.uname().nodename
    assert str(Path.cwd()) not in text
    assert str(Path.home()) not in text
    assert len(node) < 4 or node not in text


def test_hardware_threads_of_one_core_count_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for cpu in range(4):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "core_id").write_text(f"{cpu % 2}\n")
        (topology / "physical_package_id").write_text("0\n")
    monkeypatch.setattr(env, "_SYS", tmp_path)
    monkeypatch.setattr(env, "_quota", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert env.cores() == env.Cores(logical=3, physical=2)


@pytest.mark.parametrize(("quota", "usable"), [(None, 8), (2.5, 3), (0.5, 1), (64.0, 8)])
def test_container_quota_bounds_the_threads(quota: float | None, usable: int) -> None:
    assert env.Cores(16, 8, quota).usable == usable


def test_gpus_are_read_from_the_drivers_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    env.gpus.cache_clear()
    answer = "NVIDIA A10, 550.54, 23028, GPU-aa\nNVIDIA T4, 550.54, 15360, GPU-bb\n"
    monkeypatch.setattr(env.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(env.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=answer))
    try:
        assert [gpu.name for gpu in env.gpus()] == ["NVIDIA A10", "NVIDIA T4"]
        assert env.gpu_name() == "NVIDIA A10 or NVIDIA T4"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bb")
        assert env.gpu_name() == "NVIDIA T4"
    finally:
        env.gpus.cache_clear()
