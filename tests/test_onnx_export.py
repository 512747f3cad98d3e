"""Export: right at every size, exact in bytes, deterministic, standard, and without a trace of the machine."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from shipped import EMBEDDING, MODELS, SIGNATURES, exported, run_onnx

import converters.onnx_export as onnx_export
from deploy_prune.errors import UnsupportedModelError, UsageError
from deploy_prune.signature import Signature, TensorSpec

ROOT = Path(__file__).parents[1]
OFF_TRACE = [(1, 1), (1, 7), (5, 1), (2, 64), (3, 33)]  # (batch, sequence); traced at (2, 11); 64 is the longest


@pytest.fixture(params=MODELS)
def case(request):
    model = request.getfixturevalue(request.param)
    return model, SIGNATURES[request.param], *exported(request.param, model)


def assert_agree(model, signature, path, batch, sequence, padding):
    inputs = signature.random_inputs({"batch": batch, "sequence": sequence}, seed=batch, padding=padding)
    with torch.no_grad():
        expected = signature.call(model, inputs)
    got = run_onnx(path, inputs)
    assert got.shape == expected.shape
    if expected.dim() == 3:  # positions on padding mean nothing
        valid = inputs["attention_mask"].bool()
        got, expected = got[valid], expected[valid]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
def test_onnx_equals_torch_off_the_trace(case, padding):
    model, signature, path, _ = case
    for batch, sequence in OFF_TRACE:
        assert_agree(model, signature, path, batch, sequence, padding)


def test_embedding_with_mean_pooling_equals_torch_and_names_what_it_does_not_read(tiny_bert):
    path, report = exported("embedding", tiny_bert, EMBEDDING)
    for batch, sequence in OFF_TRACE:
        assert_agree(tiny_bert, EMBEDDING, path, batch, sequence, padding=True)
    assert set(report.initializers.unused) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }


def test_eager_attention_exports_as_well(tiny_bert, tmp_path):
    model, name = tiny_bert, "tiny_bert"
    model.set_attn_implementation("eager")
    onnx_export.export_onnx(model, tmp_path / "eager.onnx", SIGNATURES[name])
    assert_agree(model, SIGNATURES[name], tmp_path / "eager.onnx", 3, 17, padding=True)


def test_weight_bytes_are_four_per_parameter_exactly(case):
    model, _, path, report = case
    parameters = sum(p.numel() for p in model.parameters())
    assert report.weight_bytes + sum(report.initializers.unused.values()) == 4 * parameters
    stored = {i.name: numpy_helper.to_array(i).nbytes for i in onnx.load(path).graph.initializer}
    listed = report.initializers.weights | report.initializers.buffers | report.initializers.constants
    assert stored == listed
    assert report.initializer_bytes == sum(stored.values())
    assert all(size <= 512 for size in (report.initializers.buffers | report.initializers.constants).values())


def test_weights_keep_their_names_and_values(case):
    model, _, path, report = case
    parameters = dict(model.named_parameters())
    for initializer in onnx.load(path).graph.initializer:
        if initializer.name in report.initializers.weights:
            value = numpy_helper.to_array(initializer)
            name = initializer.name.removesuffix(".T")
            value = value.T if initializer.name.endswith(".T") else value
            np.testing.assert_array_equal(value, parameters[name].detach().numpy())


def test_equal_weights_stay_apart_so_that_bytes_do_not_depend_on_values(tiny_vit, tmp_path):
    reference = exported("tiny_vit", tiny_vit)[1]
    with torch.no_grad():
        for parameter in tiny_vit.parameters():
            parameter.zero_()
    report = onnx_export.export_onnx(tiny_vit, tmp_path / "zero.onnx", SIGNATURES["tiny_vit"])
    assert report.initializers == reference.initializers
    assert report.nodes == reference.nodes


def test_tied_embeddings_are_stored_once(tiny_llama):
    _, report = exported("tiny_llama", tiny_llama)
    assert [n for n in report.initializers.weights if "embed" in n or "lm_head" in n] == ["model.embed_tokens.weight"]


def test_untied_output_layer_is_stored_beside_the_embedding(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    report = onnx_export.export_onnx(model, tmp_path / "untied.onnx", SIGNATURES["tiny_llama"])
    assert report.weight_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert {"model.embed_tokens.weight", "lm_head.weight.T"} <= set(report.initializers.weights)


def test_only_standard_operators_and_named_dynamic_dimensions(case):
    _, signature, path, report = case
    proto = onnx.load(path)
    assert {node.domain for node in proto.graph.node} == {""}
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 18)]
    assert not proto.functions
    for spec, value in zip(
        (*signature.inputs, signature.output), (*proto.graph.input, *proto.graph.output), strict=True
    ):
        dims = value.type.tensor_type.shape.dim
        assert (value.name, tuple(d.dim_param or d.dim_value for d in dims)) == (spec.name, spec.shape)
    assert (report.bytes, report.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


def test_file_carries_no_path_and_no_stack_trace(case):
    content = case[2].read_bytes()
    for private in (b"site-packages", b".py", b"stack_trace", b"pkg.torch", str(ROOT).encode(), b"namespace"):
        assert private not in content


_IN_ANOTHER_PROCESS = """
import sys, hashlib
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import conftest
from shipped import SIGNATURES
from converters.onnx_export import export_onnx
def build(name):
    fixture = getattr(conftest, name)
    return (getattr(fixture, "__wrapped__", None) or fixture.__pytest_wrapped__.obj)()
for name in ("tiny_llama",):
    print(export_onnx(build(name), f"{sys.argv[2]}/{name}.onnx", SIGNATURES[name]).sha256)
"""


def test_another_process_writes_the_same_bytes(tiny_llama, tmp_path):
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    result = subprocess.run(
        [sys.executable, "-c", _IN_ANOTHER_PROCESS, str(ROOT), str(tmp_path)],
        text=True,
        capture_output=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [exported("tiny_llama", tiny_llama)[1].sha256]
    assert result.stderr == ""


def test_model_is_left_as_it_was(tiny_vit, tmp_path):
    tiny_vit.train()
    tiny_vit.head.eval()
    modes = {name: module.training for name, module in tiny_vit.named_modules()}
    before = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in tiny_vit.named_parameters()}
    onnx_export.export_onnx(tiny_vit, tmp_path / "m.onnx", SIGNATURES["tiny_vit"], metadata={"member": "s30"})
    assert modes == {name: module.training for name, module in tiny_vit.named_modules()}
    for name, p in tiny_vit.named_parameters():
        identity, grad, value = before[name]
        assert (id(p), p.requires_grad) == (identity, grad)
        assert torch.equal(p, value)
    assert {p.key: p.value for p in onnx.load(tmp_path / "m.onnx").metadata_props} == {"member": "s30"}


def test_large_weights_go_beside_the_graph_in_the_same_directory(tiny_vit, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "EXTERNAL_ABOVE", 1000)
    path = tmp_path / "large.onnx"
    report = onnx_export.export_onnx(tiny_vit, path, SIGNATURES["tiny_vit"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
    assert report.external == "large.onnx.data"
    assert report.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert_agree(tiny_vit, SIGNATURES["tiny_vit"], path, 3, 1, padding=False)


class _Frozen(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x.reshape(2, 4))


class _Branching(_Frozen):
    def forward(self, x):
        return self.layer(x) if float(x.sum()) > 0 else -self.layer(x)


_TOY = Signature(
    (TensorSpec("x", "float32", ("batch", 4)),),
    TensorSpec("y", "float32", ("batch", 2)),
    lambda model, inputs: model(inputs["x"]),
)


@pytest.mark.parametrize("module", [_Frozen, _Branching])
def test_model_that_fixes_a_size_or_branches_on_values_is_refused(module, tmp_path):
    with pytest.raises(UnsupportedModelError, match=f"cannot trace {module.__name__}"):
        onnx_export.export_onnx(module(), tmp_path / "toy.onnx", _TOY)
    assert list(tmp_path.iterdir()) == []


def test_output_that_is_not_the_signatures_is_refused(tmp_path):
    wrong = Signature(_TOY.inputs, TensorSpec("y", "float32", ("batch", 3)), lambda model, x: model.layer(x["x"]))
    with pytest.raises(UnsupportedModelError, match=r"y: the graph has shape .*signature \['batch', 3\]"):
        onnx_export.export_onnx(_Frozen(), tmp_path / "toy.onnx", wrong)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_weights_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"layer.weight: torch.float16"):
        onnx_export.export_onnx(_Frozen().half(), tmp_path / "toy.onnx", _TOY)


@pytest.mark.parametrize(
    ("kv", "mask", "causal"),
    [(4, "none", False), (4, "none", True), (2, "bool", False), (2, "float", False), (2, "none", True)],
)
def test_attention_translation_equals_torch(kv, mask, causal, tmp_path):
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 8)

        def forward(self, q, k, m):
            m = {"none": None, "bool": m > 0, "float": m}[mask]
            return torch.nn.functional.scaled_dot_product_attention(
                self.layer(q), k, 2 * k, attn_mask=m, is_causal=causal, enable_gqa=kv != 4
            )

    signature = Signature(
        (
            TensorSpec("q", "float32", ("batch", 4, "sequence", 8)),
            TensorSpec("k", "float32", ("batch", kv, 6, 8)),
            TensorSpec("m", "float32", ("batch", 1, "sequence", 6)),
        ),
        TensorSpec("out", "float32", ("batch", 4, "sequence", 8)),
        lambda model, x: model(x["q"], x["k"], x["m"]),
    )
    model = Attention().eval()
    if mask == "none":  # an unused input is dropped by no one, yet the tracer needs it read
        signature = Signature(
            signature.inputs, signature.output, lambda model, x: model(x["q"], x["k"], x["m"]) + 0 * x["m"].sum()
        )
    onnx_export.export_onnx(model, tmp_path / "a.onnx", signature)
    inputs = signature.random_inputs({"batch": 3, "sequence": 5}, seed=0)
    inputs["m"][..., 0] = 1.0  # a boolean mask must leave every row something to attend to
    with torch.no_grad():
        torch.testing.assert_close(
            run_onnx(tmp_path / "a.onnx", inputs), signature.call(model, inputs), rtol=1e-5, atol=1e-6
        )
