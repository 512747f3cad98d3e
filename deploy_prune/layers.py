"""Things with features that a cut can shorten: linear layers, transformers' transposed ones, and bare parameters."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deploy_prune.units import Axis

if TYPE_CHECKING:
    from numpy.typing import NDArray

# GPT-2's layer: a linear layer that stores its weight as (in, out).
_TRANSPOSED = "transformers.pytorch_utils.Conv1D"


def layer_at(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    """The module or parameter `name` of `model`. Raises AttributeError when there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return model.get_parameter(name)


def is_transposed(layer: nn.Module | nn.Parameter) -> bool:
    cls = type(layer)
    return f"{cls.__module__}.{cls.__qualname__}" == _TRANSPOSED


def is_cuttable(layer: nn.Module | nn.Parameter) -> bool:
    """Whether a cut understands the layer; subclasses of nn.Linear that compute something else are refused."""
    return type(layer) is nn.Linear or is_transposed(layer) or isinstance(layer, nn.Parameter)


def plain(layer: nn.Module) -> nn.Module:
    """The layer itself, or the one that an adapter of peft was put beside."""
    if "peft" not in sys.modules:
        return layer
    from peft.tuners.tuners_utils import BaseTunerLayer

    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def matrix(layer: nn.Module | nn.Parameter) -> Tensor:
    """A view of the layer's weight as (out, in); writing into it changes the layer.

    A parameter is (first dimension, everything else).
    """
    if isinstance(layer, nn.Parameter):
        return layer.detach().flatten(1) if layer.dim() > 1 else layer.detach().unsqueeze(1)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if is_transposed(plain(layer)) else weight.detach()


def bias_of(layer: nn.Module | nn.Parameter) -> Tensor | None:
    """The layer's bias (out,), None without one."""
    bias = None if isinstance(layer, nn.Parameter) else layer.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


def width(layer: nn.Module | nn.Parameter, axis: Axis) -> int:
    """Features on one axis of the layer."""
    return int(matrix(layer).shape[0 if axis == "out" else 1])


def cut(model: nn.Module, name: str, axis: Axis, stays: NDArray) -> None:
    """Keep only the features of layer `name` where `stays` is true, in place and in their order."""
    layer = layer_at(model, name)
    if isinstance(layer, nn.Parameter):
        owner, _, attribute = name.rpartition(".")
        dim = 0 if axis == "out" else 1
        setattr(model.get_submodule(owner), attribute, _shorter(layer, dim, stays))
        return
    dim = 0 if (axis == "out") is not is_transposed(layer) else 1
    layer.weight = _shorter(layer.weight, dim, stays)
    if axis == "out" and layer.bias is not None:
        layer.bias = _shorter(layer.bias, 0, stays)
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    else:
        conv1d: Any = layer
        conv1d.nx, conv1d.nf = layer.weight.shape  # its own words for in and out


def _shorter(parameter: Tensor | nn.Module, dim: int, stays: NDArray) -> nn.Parameter:
    assert isinstance(parameter, Tensor)
    index = torch.from_numpy(stays.nonzero()[0]).to(parameter.device)
    value = parameter.detach().index_select(dim, index).contiguous()
    return nn.Parameter(value, requires_grad=parameter.requires_grad)
