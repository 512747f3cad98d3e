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


class MixedBits(Body):
    def forward(self, x: Tensor) -> Tensor:
        whole = (x * 8).to(torch.int64)
        return self.linear(x) + (whole & (x > 0)) + ((x * 4).to(torch.int32) & whole) + (whole[0, 0] & (x > 0))


class InPlace(Body):
    """A view is written to, and the whole is read."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y[:, 2:4].mul_(3)
        return y


class SetItem(Body):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y[:, 2:4] = x[:, :2]
        return y


class Region(Body):
    """A graph within the graph."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = self.linear(x)
        return y * 2


class Last(Body):
    """Of a dynamic dimension; exported as an empty slice where it is not decomposed."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x.narrow(0, -1, 1)


class EvenChunks(Body):
    def forward(self, x: Tensor) -> Tensor:
        a, b = self.linear(x).chunk(2, dim=-1)
        return torch.cat([a * b, a], -1)


class UnevenChunks(Body):
    def forward(self, x: Tensor) -> Tensor:
        parts = self.linear(x).chunk(5, dim=-1)
        return torch.cat(parts[::-1], -1)


class Widened(Body):
    """A class token: -1 keeps a size."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear.bias[None].broadcast_to(x.shape[0], -1)


class Imaginary(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.view_as_real(x.to(torch.complex64))[..., 0]


class Lacking(Body):
    """torch can decompose adaptive pooling, ONNX has none."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + nn.functional.adaptive_avg_pool1d(x[:, None], 3).repeat(1, 1, 2)[:, 0]


@pytest.fixture
def counts(monkeypatch):
    """How often a program was decomposed, and how often it was translated."""
    made = {"decomposed": 0, "translated": 0}
    decompose, export = torch.export.ExportedProgram.run_decompositions, torch.onnx.export

    def counted_decompose(self, *args, **options):
        made["decomposed"] += 1
        return decompose(self, *args, **options)

    def counted_export(*args, **options):
        made["translated"] += 1
        return export(*args, **options)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted_decompose)
    monkeypatch.setattr(torch.onnx, "export", counted_export)
    return made


@pytest.mark.parametrize("kind", [Plain, Masked, Bits, MixedBits, EvenChunks])
def test_plain_programs_are_not_decomposed_and_equal_torch(kind, counts, tmp_path):
    assert_exports(kind(), tmp_path / "model.onnx")
    assert counts == {"decomposed": 0, "translated": 1}


@pytest.mark.parametrize("kind", [InPlace, SetItem, Region, Last, UnevenChunks, Widened, Lacking])
def test_programs_are_decomposed_where_they_must_and_equal_torch(kind, counts, tmp_path):
    assert_exports(kind(), tmp_path / "model.onnx")
    assert counts == {"decomposed": 1, "translated": 1}


def test_a_program_with_an_operator_that_nobody_translates_is_decomposed(counts, tmp_path):
    assert_exports(Imaginary(), tmp_path / "model.onnx")
    assert counts == {"decomposed": 1, "translated": 2}


def test_attention_with_unflatten_is_fused(tmp_path):
    class Attention(Body):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (self.linear(x * i).unflatten(-1, (2, 3)).transpose(1, 2) for i in (1, 2, 3))
            return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    shape = ("batch", "sequence", 6)
    signature = Signature(
        (TensorSpec("x", "float32", shape),),
        TensorSpec("y", "float32", shape),
        lambda model, inputs: model(inputs["x"]),
    )
    export_onnx(Attention().eval(), tmp_path / "model.onnx", signature, opset=20, variant="ort")
    used = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert used & {"Attention", "MultiHeadAttention"}
    assert "Softmax" not in used


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
def test_models_are_not_decomposed_and_have_the_nodes_they_would_have(name, request, counts, tmp_path, monkeypatch):
    from forms import signature_of

    model, signature = request.getfixturevalue(name), signature_of(name)
    export_onnx(model, tmp_path / "traced.onnx", signature, opset=20, variant="ort")
    assert not counts["decomposed"]
    monkeypatch.setattr(tracing, "_decomposes", lambda *_: True)
    export_onnx(model, tmp_path / "decomposed.onnx", signature, opset=20, variant="ort")
    assert counts["decomposed"]
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
