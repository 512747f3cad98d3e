"""torch -> the nodes of ONNX's standard, as torch's own exporter gives them: traced, translated, under our names."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from converters.translations import translations
from deploy_prune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram
    from torch.fx import Node

    from deploy_prune.signature import Signature


def trace(model: nn.Module, signature: Signature, sizes: Mapping[str, int], opset: int) -> Any:
    """The onnx-ir model of `signature.call`, not yet simplified; initialisers have the names of `named_parameters`.

    `sizes` are those of the example that the function is run with once. Raises UnsupportedModelError where it cannot be
    traced.
    """
    import torch

    device = next(model.parameters()).device
    inputs = signature.random_inputs(sizes, seed=0)
    args = tuple(inputs[spec.name].to(device) for spec in signature.inputs)
    try:
        with _evaluating(model), torch.no_grad(), _without_treespec_warning(), _uncollected():
            function = as_module(model, signature)
            program = torch.export.export(function, args, dynamic_shapes=dynamic_shapes(signature), strict=False)
            exported = _translated(program, signature, opset)
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException, ValueError) as error:
        raise UnsupportedModelError(
            f"cannot trace {type(model).__name__}",
            got=_root_cause(error),
            remedy="The forward must not branch on tensor values and must accept any size the signature names.",
        ) from error
    _own_names(exported, model)
    return exported


def _translated(program: ExportedProgram, signature: Signature, opset: int) -> Any:
    """The program as ONNX. Its operators are decomposed into simpler ones first only where ONNX lacks one of them: that
    runs the whole program anew on symbolic shapes, twice, and takes as long as all the rest."""
    import torch

    decompose = program.run_decompositions
    decomposed = False

    def export() -> Any:
        result = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
            custom_translation_table=translations(),
        )
        assert result is not None
        return result.model

    def where_needed(decomp_table: Mapping[Any, Any] | None = None, **options: Any) -> ExportedProgram:
        nonlocal decomposed
        decomposed = decomp_table is None or _decomposes(program, decomp_table)
        return decompose(decomp_table, **options) if decomposed else program

    program.run_decompositions = where_needed  # type: ignore[method-assign,assignment]
    try:
        return export()
    except torch.onnx.OnnxExporterError:
        if decomposed:
            raise
        program.run_decompositions = decompose  # type: ignore[method-assign]
        return export()  # an operator that neither the table nor ONNX knows: it is made of others


def _decomposes(program: ExportedProgram, table: Mapping[Any, Any]) -> bool:
    """Whether the program must be decomposed: it has operators of `table`, which ONNX lacks, or such as work in place
    or hold other graphs, or composite views, which torch always decomposes: some have translations that are wrong.
    """
    import torch

    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return True
        if isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema
            if node.target in table or schema.is_mutable:
                return True
            view = any(argument.alias_info for argument in schema.arguments)
            if view and node.target._can_decompose() and not _is_plain_view(node):
                return True
    return False


def _is_plain_view(node: Node) -> bool:
    """Whether a composite view is one whose translation is right and no worse than that of its parts."""
    import torch

    aten = torch.ops.aten
    if node.target is aten.chunk.default:  # even ones, of a known size
        source, count, dim = (*node.args, 0)[:3]
        size: Any = source.meta["val"].shape[dim]  # type: ignore[union-attr,index]
        return isinstance(size, int) and isinstance(count, int) and count > 1 and size % count == 0
    return node.target in {
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.contiguous.default,
        aten.view_as.default,
        aten.expand_as.default,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
    }


def dynamic_shapes(signature: Signature) -> Any:
    """The `dynamic_shapes` of torch's exporters for `as_module`: every dimension that the signature names is free."""
    import torch

    free = torch.export.Dim.DYNAMIC
    return (tuple({i: free for i, d in enumerate(s.shape) if isinstance(d, str)} for s in signature.inputs),)


def as_module(model: nn.Module, signature: Signature) -> nn.Module:
    """A module around `signature.call` with one positional argument per input."""
    from torch import nn

    class Function(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
            inputs = dict(zip((s.name for s in signature.inputs), tensors, strict=True))
            return (signature.call_all or signature.call)(self.model, inputs)

    function = Function()
    function.training = False  # not eval(), which would visit the model
    return function


def _own_names(exported: Any, model: nn.Module) -> None:
    """Drop the wrapper's prefix from initialisers and give tied weights the name `named_parameters` uses."""
    first = {id(p): name for name, p in model.named_parameters()}
    canonical = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    graph = exported.graph
    values = list(graph.initializers.values())
    graph.initializers.clear()
    for value in values:
        own = value.name.removeprefix("model.")
        own = canonical.get(own, own)
        if own in graph.initializers:
            value.replace_all_uses_with(graph.initializers[own])
        else:
            value.name = own
            graph.register_initializer(value)


def _root_cause(error: BaseException) -> str:
    """The first error of a chain; the exporter wraps it in several screens of advice to its own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip()[:600]}"


@contextlib.contextmanager
def _without_treespec_warning() -> Iterator[None]:
    """torch 2.11's own exporter copies a class that torch 2.11 calls deprecated, and says so to our users."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        yield


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode within the block, and as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No search for cyclic garbage within the block: a trace makes millions of objects that live until its end."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
