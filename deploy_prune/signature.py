"""What goes into a model and what comes out: the contract shared by tasks, ONNX export, parity and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: `TensorSpec("input_ids", "int64", ("batch", "sequence"), "ids", high=30522)`.

    A string in `shape` names a dynamic dimension. `role` says how to make up values: `values` are standard
    normal, `ids` are uniform in [0, high), `mask` is 1 on a prefix of each row and 0 on its padding.
    """

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | str, ...]
    role: Literal["values", "ids", "mask"] = "values"
    high: int = 0

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The concrete shape when the dynamic dimensions have the given sizes."""
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.shape)


@dataclass(frozen=True)
class Signature:
    """Inputs and the output of the function a bundle ships; `call` computes it from a live model.

    `call(model, inputs)` maps the named input tensors to the output tensor. A function with state has further outputs,
    `state` (the key/value caches of a decoder), and `call_all`, which gives the output and all of them.
    """

    inputs: tuple[TensorSpec, ...]
    output: TensorSpec
    call: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
    state: tuple[TensorSpec, ...] = ()
    call_all: Callable[[nn.Module, Mapping[str, Tensor]], tuple[Tensor, ...]] | None = None

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The output, then the state."""
        return (self.output, *self.state)

    @property
    def dynamic(self) -> tuple[str, ...]:
        """Names of the dynamic dimensions, in order of appearance: ("batch", "sequence")."""
        return tuple(dict.fromkeys(d for spec in self.inputs for d in spec.shape if isinstance(d, str)))

    def random_inputs(self, sizes: Mapping[str, int], *, seed: int, padding: bool = False) -> dict[str, Tensor]:
        """Made-up inputs at the given sizes; with `padding`, every row but the first is padded on the right."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        made: dict[str, Tensor] = {}
        for spec in self.inputs:
            shape = spec.sized(sizes)
            if spec.role == "ids":
                made[spec.name] = torch.randint(0, spec.high, shape, generator=generator)
            elif spec.role == "mask":
                mask = torch.ones(shape, dtype=torch.int64)
                if padding:
                    for row in range(1, shape[0]):
                        mask[row, max(1, shape[1] - row - shape[1] // 3) :] = 0
                made[spec.name] = mask
            else:
                made[spec.name] = torch.randn(shape, generator=generator)
        return made

    def describe(self) -> dict[str, Any]:
        """The signature as plain JSON data, for the manifest."""

        def one(spec: TensorSpec) -> dict[str, Any]:
            return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "role": spec.role}

        return {"inputs": [one(s) for s in self.inputs], "output": one(self.output)}
