"""Truth 4 for every family: a compact model's ONNX and checkpoint are the model, and it can be cut again."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from forms import FAMILIES, output, random_path, relative_error, signature_of
from shipped import run_onnx

from converters.checkpoint import load_pruned, save_pruned
from converters.onnx_export import export_onnx
from converters.passes.stored import assemble
from converters.surgery import compact
from deploy_prune.adapters import find_sites
from deploy_prune.gates import masked

OFF_TRACE = [(1, 1), (3, 17)]  # (batch, sequence)


@pytest.fixture(params=FAMILIES)
def cut(request):
    """(signature, dense model, plan that cuts units of every kind, compact model)."""
    model, signature = request.getfixturevalue(request.param), signature_of(request.param)
    plan = random_path(model, signature, seed=1).plan(0.4)
    return signature, model, plan, compact(model, plan)


def test_onnx_of_the_compact_model_equals_torch_off_the_trace(cut, tmp_path):
    signature, _, _, small = cut
    file = tmp_path / "small.onnx"
    report = export_onnx(small, file, signature, opset=20, variant="ort")  # with every pass there is
    for batch, sequence in OFF_TRACE:
        inputs = signature.random_inputs({"batch": batch, "sequence": sequence}, seed=batch, padding=True)
        with torch.no_grad():
            expected = signature.call(small, inputs)
        got = run_onnx(file, inputs)
        if signature.output.shape[:2] == ("batch", "sequence"):  # what lies on padding means nothing
            valid = inputs["attention_mask"].bool()
            got, expected = got[valid], expected[valid]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    parameters = {name: p.detach().numpy() for name, p in small.named_parameters()}
    for tensor in onnx.load(file).graph.initializer:
        if tensor.name in report.initializers.weights:
            np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), assemble(tensor.name, parameters))


def test_a_saved_compact_model_loads_bit_for_bit(cut, tmp_path):
    signature, _, plan, small = cut
    save_pruned(small, plan, tmp_path / "small", base_model="tiny")
    assert torch.equal(output(load_pruned(tmp_path / "small"), signature), output(small, signature))


def test_a_compact_model_can_be_cut_again(cut):
    signature, _, _, small = cut
    plan = random_path(small, signature, seed=2).plan(0.4)
    with masked(small, find_sites(small), plan):
        expected = output(small, signature)
    assert relative_error(output(compact(small, plan), signature), expected) < 1e-5
