"""OpenVINO, torch and TensorRT as runtimes: the same answers, what really runs is told, what cannot run is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from forms import image_signature, random_path, text_signature
from onnx_models import save_mlp
from torch import nn

from bench.contention import Snapshot, between
from bench.runtimes import RUNTIMES, get_runtime
from bench.runtimes.cost import building
from bench.runtimes.openvino import OpenVino, options_of
from bench.runtimes.ort_cpu import OrtCpu
from bench.runtimes.ort_tensorrt import refuse_strays
from bench.runtimes.placement import Node, Placement
from bench.runtimes.torch_forms import OWN, RANDOM, torch_form
from converters.checkpoint import save_pruned
from converters.onnx_export import export_onnx
from converters.surgery import compact
from deploy_prune.errors import ArtifactError, UnavailableError, UsageError

X = {"x": np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)}
IMAGES = {"pixel_values": np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)}
needs_openvino = pytest.mark.skipif(OpenVino().available() is not None, reason="openvino is not installed")


@pytest.fixture
def mlp(tmp_path: Path) -> Path:
    return save_mlp(tmp_path / "dense.onnx")


@pytest.fixture
def bundle(tiny_vit: nn.Module, tmp_path: Path) -> Path:
    """Models and checkpoints of a dense model and one member, as a bundle has them."""
    plan = random_path(tiny_vit, image_signature()).plan(0.4)
    small = compact(tiny_vit, plan, check_weights=False)
    (tmp_path / "models").mkdir()
    export_onnx(tiny_vit, tmp_path / "models" / "dense.onnx", image_signature())
    export_onnx(small, tmp_path / "models" / "s40.onnx", image_signature())
    save_pruned(small, plan, tmp_path / "checkpoints" / "s40")
    return tmp_path


@needs_openvino
def test_openvino_computes_what_onnxruntime_computes_and_says_by_which_kernels(mlp: Path) -> None:
    session = OpenVino().load(mlp, threads=1)
    bound = session.bind(X)
    bound()
    assert np.allclose(bound.outputs()[0], OrtCpu().load(mlp, threads=1).run(X)[0], rtol=1e-5, atol=1e-6)
    facts = session.describe()
    assert facts["options"] == {**options_of(1), "affinity": facts["options"]["affinity"]}
    assert sum(facts["placement"].values()) > 0 and all(kind.startswith("CPU") for kind in facts["placement"])
    assert facts["build_seconds"] > 0 and facts["memory"]["process_peak_bytes"] > 0
    json.dumps(facts)


@needs_openvino
def test_openvino_keeps_fp32_as_fp32(mlp: Path) -> None:
    import openvino

    compiled = openvino.Core().compile_model(str(mlp), "CPU", options_of(1))
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    assert compiled.get_property("NUM_STREAMS") == 1


@needs_openvino
@pytest.mark.parametrize("inputs", [{"y": X["x"]}, {}, {"x": X["x"][:, :3]}, {"x": X["x"].astype(np.float64)}])
def test_openvino_refuses_inputs_that_do_not_fit(mlp: Path, inputs: dict[str, np.ndarray]) -> None:
    session = OpenVino().load(mlp, threads=1)
    for attempt in (session.run, session.bind):
        with pytest.raises(UsageError):
            attempt(inputs)


@needs_openvino
def test_openvino_refuses_what_it_cannot_load(tmp_path: Path, mlp: Path) -> None:
    (tmp_path / "cut.onnx").write_bytes(mlp.read_bytes()[:-30])
    with pytest.raises(ArtifactError, match=r"cut\.onnx"):
        OpenVino().load(tmp_path / "cut.onnx")
    with pytest.raises(UnavailableError, match=r"gone\.onnx"):
        OpenVino().load(tmp_path / "gone.onnx")


def test_absent_openvino_is_refused_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UnavailableError, match=r"deploy-prune\[openvino\]"):
        get_runtime("openvino")


def test_torch_runs_the_members_checkpoint_and_gives_the_files_answer(bundle: Path) -> None:
    onnx = bundle / "models" / "s40.onnx"
    session = RUNTIMES["torch-cpu"].load(onnx, threads=1)
    bound = session.bind(IMAGES)
    bound()
    assert np.allclose(bound.outputs()[0], OrtCpu().load(onnx, threads=1).run(IMAGES)[0], rtol=1e-4, atol=1e-4)
    facts = session.describe()
    assert facts["weights"] == OWN and facts["options"]["threads"] == 1
    json.dumps(facts)


def test_torch_computes_on_the_threads_asked_for_and_the_process_has_its_own_back(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, real, before = [], torch.nn.functional.linear, torch.get_num_threads()

    def linear(*given: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return real(*given)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    session = RUNTIMES["torch-cpu"].load(bundle / "models" / "s40.onnx", threads=before + 1)
    assert torch.get_num_threads() == before and session.describe()["options"]["threads"] == before + 1
    bound = session.bind(IMAGES)
    bound()
    bound.outputs()
    with pytest.raises(UsageError, match="does not run"):
        session.bind({"pixel_values": IMAGES["pixel_values"][:, :2]})
    assert set(seen) == {before + 1} and torch.get_num_threads() == before


def test_the_dense_model_is_timed_as_its_architecture_and_says_so(bundle: Path) -> None:
    form = torch_form(bundle / "models" / "dense.onnx")
    assert form.weights == RANDOM
    assert form.model.blocks[0].attn.num_heads == 3
    RUNTIMES["torch-cpu"].load(bundle / "models" / "dense.onnx", threads=1).bind(IMAGES)


def test_a_text_model_is_called_by_the_names_of_its_inputs(tiny_bert: nn.Module, tmp_path: Path) -> None:
    signature = text_signature(("batch", 3))
    plan = random_path(tiny_bert, signature).plan(0.3)
    small = compact(tiny_bert, plan, check_weights=False)
    (tmp_path / "models").mkdir()
    export_onnx(small, tmp_path / "models" / "s30.onnx", signature)
    save_pruned(small, plan, tmp_path / "checkpoints" / "s30")
    inputs = {n: t.numpy() for n, t in signature.random_inputs({"batch": 2, "sequence": 9}, seed=1).items()}
    found = RUNTIMES["torch-cpu"].load(tmp_path / "models" / "s30.onnx", threads=1).run(inputs)[0]
    expected = OrtCpu().load(tmp_path / "models" / "s30.onnx", threads=1).run(inputs)[0]
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_torch_refuses_images_of_another_size(bundle: Path) -> None:
    session = RUNTIMES["torch-cpu"].load(bundle / "models" / "s40.onnx", threads=1)
    session.run(IMAGES)  # its function is known from here on
    (name,) = IMAGES
    with pytest.raises(UsageError, match="Choose sizes that the model takes") as caught:
        session.run({name: IMAGES[name][..., :-1]})
    assert name in str(caught.value)


def test_a_checkpoint_of_another_model_than_the_file_is_refused(bundle: Path) -> None:
    weights = {n: torch.zeros_like(t) for n, t in torch_form(bundle / "models" / "s40.onnx").model.state_dict().items()}
    form = torch_form(bundle / "models" / "s40.onnx")
    form.model.load_state_dict(weights)
    with pytest.raises(UnavailableError, match="does not compute what the ONNX file does"):
        form.function(IMAGES)


def test_an_onnx_file_without_a_checkpoint_has_no_torch_form(mlp: Path) -> None:
    with pytest.raises(UnavailableError, match="no checkpoint belongs"):
        RUNTIMES["torch-cpu"].load(mlp)


def test_code_is_not_run_unless_it_is_trusted(tmp_path: Path) -> None:
    from deploy_prune.demo import digits_vit_untrained

    model = digits_vit_untrained()
    signature = image_signature(8, 10)
    one = type(signature)(
        (type(signature.inputs[0])("pixel_values", "float32", ("batch", 1, 8, 8)),), signature.output, signature.call
    )
    plan = random_path(model, one).plan(0.3)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "s30.onnx").write_bytes(b"")
    save_pruned(compact(model, plan, check_weights=False), plan, tmp_path / "checkpoints" / "s30")
    with pytest.raises(UsageError, match="Python code"):
        get_runtime("torch-cpu").load(tmp_path / "models" / "s30.onnx")
    form = torch_form(tmp_path / "models" / "s30.onnx", trust_code=True)
    assert form.weights == OWN
    trusting: Any = get_runtime("torch-cpu", trust_code=True)
    assert trusting.trust_code and not RUNTIMES["torch-cpu"].trust_code  # type: ignore[attr-defined]


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_cuda_that_is_not_there_or_that_torch_does_not_see_is_refused(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.runtimes.torch_runtime.gpus", lambda: ())
    with pytest.raises(UnavailableError, match="no NVIDIA driver"):
        get_runtime("torch-cuda")
    monkeypatch.setattr("bench.runtimes.torch_runtime.gpus", lambda: ("one",))
    for name in ("torch-cuda", "torch-compile"):
        with pytest.raises(UnavailableError, match="torch sees no CUDA device"):
            RUNTIMES[name].load(bundle / "models" / "s40.onnx")


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    if not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match="no C\\+\\+ compiler"):
            get_runtime("torch-compile")


@pytest.mark.slow
def test_a_compiled_model_gives_the_files_answer(bundle: Path) -> None:
    session = RUNTIMES["torch-compile"].load(bundle / "models" / "s40.onnx", threads=1)
    found = session.run(IMAGES)[0]
    expected = OrtCpu().load(bundle / "models" / "s40.onnx", threads=1).run(IMAGES)[0]
    assert np.allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert session.describe()["options"]["fullgraph"] is True


@pytest.mark.skipif("TensorrtExecutionProvider" in onnxruntime.get_available_providers(), reason="TensorRT is here")
def test_absent_tensorrt_is_refused(mlp: Path) -> None:
    for attempt in (lambda: get_runtime("ort-tensorrt"), lambda: RUNTIMES["ort-tensorrt"].load(mlp)):
        with pytest.raises(UnavailableError, match="TensorrtExecutionProvider"):
            attempt()


def test_nodes_left_to_the_cpu_are_named_and_those_on_cuda_allowed(mlp: Path) -> None:
    def placed(*providers: str) -> Placement:
        return Placement(tuple(Node(f"n{i}", "MatMul", p, False) for i, p in enumerate(providers)))

    refuse_strays(mlp, placed("TensorrtExecutionProvider", "CUDAExecutionProvider"))
    with pytest.raises(UnavailableError, match=r"n1 \(MatMul\): CPUExecutionProvider"):
        refuse_strays(mlp, placed("TensorrtExecutionProvider", "CPUExecutionProvider"))
    with pytest.raises(UnavailableError, match="0 in TensorRT"):
        refuse_strays(mlp, placed("CUDAExecutionProvider"))


def test_building_is_told_apart_from_running_and_adds_up() -> None:
    facts: dict[str, Any] = {}
    with building(facts):
        held = np.ones(40_000_000, np.uint8)
    first = facts["build_seconds"]
    assert facts["memory"]["growth_bytes"] > 20_000_000 and held[0] == 1
    with building(facts):
        pass
    assert facts["build_seconds"] >= first


def test_cores_used_by_others_are_what_the_machine_used_beyond_this_process() -> None:
    told = between((Snapshot(0.0, 100.0, 10.0, None), Snapshot(10.0, 125.0, 20.0, None)))
    assert told["others_cores"] == 1.5 and told["contended"] and told["gpu"] is None
    quiet = between((Snapshot(0.0, 100.0, 10.0, None), Snapshot(10.0, 110.5, 20.0, None)))
    assert quiet["others_cores"] == pytest.approx(0.05) and not quiet["contended"]
    assert between((Snapshot(0.0, None, 0.0, None), Snapshot(1.0, None, 0.0, None)))["others_cores"] is None
    apart = [
        (Snapshot(0.0, 0.0, 0.0, None), Snapshot(1.0, 3.0, 1.0, None)),
        (Snapshot(9.0, 50.0, 1.0, None), Snapshot(10.0, 51.0, 2.0, None)),
    ]
    assert between(*apart)["others_cores"] == 1.0  # what happened between the spans does not count
    shared = {"other_processes": "1"}
    assert between((Snapshot(0.0, 0.0, 0.0, shared), Snapshot(1.0, 0.0, 0.0, shared)))["contended"]
