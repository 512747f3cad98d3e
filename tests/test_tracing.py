"""The program is decomposed only where ONNX lacks an operator, and means the same either way."""

from __future__ import annotations

import gc

import onnx
import pytest
import torch
from shipped import run_onnx
from torch import Tensor, nn

import converters.tracing as tracing
from converters.onnx_export import export_onnx
from converters.translations import translations
from deploy_prune.errors import UnsupportedModelError
from deploy_prune.signature import Signature, TensorSpec

SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", 6)),),
    TensorSpec("y", "float32", ("batch", 6)),
    lambda model, inputs: model(inputs["x"]),
)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)


class Plain(Body):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(self.linear(x)).to(torch.float64).to("cpu", torch.float32)


class Masked(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * ((x > 0) & (x < 1))


class Bits(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + ((x * 8).to(torch.int64) & (x * 4).to(torch.int64))


class InPlace(Body):
    """A view is written to, and the whole is read."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y[:, 2:4].mul_(3)
        return y


class Lacking(Body):
    """torch can decompose adaptive pooling, ONNX has none."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + nn.functional.adaptive_avg_pool1d(x[:, None], 3).repeat(1, 1, 2)[:, 0]


@pytest.fixture
def decompositions(monkeypatch):
    """How often the program was decomposed: one entry for each time."""
    made = []
    real = torch.export.ExportedProgram.run_decompositions

    def counted(self, *args, **options):
        made.append(1)
        return real(self, *args, **options)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted)
    return made


@pytest.mark.parametrize(("kind", "times"), [(Plain, 0), (Masked, 0), (Bits, 0), (InPlace, 1), (Lacking, 1)])
def test_programs_are_decomposed_where_they_must_and_equal_torch(kind, times, decompositions, tmp_path):
    assert_exports(kind(), tmp_path / "model.onnx")
    assert len(decompositions) == times


def test_a_program_with_an_operator_that_nobody_translates_is_decomposed(decompositions, tmp_path, monkeypatch):
    """`Tensor.to` is in no table of decompositions either."""
    attention = torch.ops.aten.scaled_dot_product_attention.default
    monkeypatch.setattr(tracing, "translations", lambda: {attention: translations()[attention]})
    assert_exports(Plain(), tmp_path / "model.onnx")
    assert len(decompositions) == 1


def assert_exports(model, file):
    torch.manual_seed(0)
    export_onnx(model.eval(), file, SIGNATURE)
    for batch in (1, 5):
        x = 2 * torch.randn(batch, 6)
        torch.testing.assert_close(run_onnx(file, {"x": x}), model(x).detach(), rtol=1e-5, atol=1e-6)


def test_a_cast_to_what_it_is_leaves_no_node(tmp_path):
    class Same(Body):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.to(torch.float32)).to("cpu")

    export_onnx(Same().eval(), tmp_path / "model.onnx", SIGNATURE)
    assert {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node} == {"Gemm"}


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_bert", "tiny_llama"])
def test_models_are_not_decomposed_and_have_the_nodes_they_would_have(
    name, request, decompositions, tmp_path, monkeypatch
):
    from forms import signature_of

    model, signature = request.getfixturevalue(name), signature_of(name)
    export_onnx(model, tmp_path / "traced.onnx", signature, opset=20, variant="ort")
    assert not decompositions
    monkeypatch.setattr(tracing, "_decomposes", lambda *_: True)
    export_onnx(model, tmp_path / "decomposed.onnx", signature, opset=20, variant="ort")
    assert decompositions
    traced, decomposed = (
        sorted(node.op_type for node in onnx.load(tmp_path / f"{kind}.onnx").graph.node)
        for kind in ("traced", "decomposed")
    )
    assert traced == decomposed


def test_garbage_is_collected_again_after_a_trace_that_failed(tmp_path):
    class Branching(Body):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if x.sum() > 0 else x

    assert gc.isenabled()
    with pytest.raises(UnsupportedModelError, match="cannot trace Branching"):
        export_onnx(Branching().eval(), tmp_path / "model.onnx", SIGNATURE)
    assert gc.isenabled()
