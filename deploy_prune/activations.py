"""Seeing what the output projections read, token by token, while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deploy_prune.signature import Signature
from deploy_prune.units import Site


@dataclass
class Watch:
    """`valid` (batch, tokens) says which tokens count; None: all do. While `idle`, nothing is seen."""

    valid: Tensor | None = None
    idle: bool = False

    def attend(self, signature: Signature, inputs: Mapping[str, Tensor]) -> None:
        """Leave the padding of the coming batch out."""
        mask = next((spec.name for spec in signature.inputs if spec.role == "mask"), None)
        self.valid = inputs[mask].bool() if mask else None

    def tokens(self, x: Tensor) -> Tensor:
        """The valid tokens of x (batch, tokens, features), or of its flattened form: (n, features). Layers that see
        another number of tokens (the image tower beside a text tower) have no padding."""
        flat = x.reshape(-1, x.shape[-1])
        if self.valid is None or self.valid.numel() != len(flat):
            return flat
        return flat[self.valid.reshape(-1)]


@contextmanager
def watching(model: nn.Module, sites: Sequence[Site], see: Callable[[str, Tensor], None]) -> Iterator[Watch]:
    """Within the block `see(site, x)` receives x (tokens, features), the valid inputs of each output projection.

    A site that serves several depths is seen at each of them.
    """
    watch = Watch()

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not watch.idle:
                see(name, watch.tokens(args[0].detach()))

        return hook

    with ExitStack() as stack:
        for site in sites:
            stack.callback(model.get_submodule(site.out).register_forward_pre_hook(hook_for(site.name)).remove)
        yield watch


@dataclass
class GradientWatch(Watch):
    """`probes` are the leaves that a loss must be differentiated by for the gradients to be seen."""

    probes: list[Tensor] = field(default_factory=list)

    def backward(self, loss: Tensor) -> None:
        """Send a loss back to the probes of the forward pass it came from, and to nothing else."""
        torch.autograd.grad(loss, self.probes, allow_unused=True)
        self.probes.clear()


@contextmanager
def watching_gradients(
    model: nn.Module, sites: Sequence[Site], see: Callable[[str, Tensor, Tensor], None]
) -> Iterator[GradientWatch]:
    """Within the block, at `backward(loss)`, `see(site, x, g)` receives x (tokens, features), the valid inputs of each
    output projection, and g (tokens,), the squared length of the loss's gradient at its outputs.

    Works with frozen weights, and leaves the model's output as it is.
    """
    watch = GradientWatch()

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None  # the first pass of activation checkpointing
            x = args[0].detach()
            probe = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            watch.probes.append(probe)
            felt = output + probe

            def seen(g: Tensor) -> None:
                if not watch.idle:
                    see(name, watch.tokens(x), watch.tokens(g).float().square().sum(-1))

            felt.register_hook(seen)
            return felt

        return hook

    with ExitStack() as stack:
        for site in sites:
            stack.callback(model.get_submodule(site.out).register_forward_hook(hook_for(site.name)).remove)
        yield watch
