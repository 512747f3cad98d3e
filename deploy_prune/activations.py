"""Seeing what the output projections read, token by token, while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from deploy_prune.signature import Signature
from deploy_prune.units import Site


@dataclass
class Watch:
    """`valid` (batch, tokens) says which tokens count; None: all do."""

    valid: Tensor | None = None

    def attend(self, signature: Signature, inputs: Mapping[str, Tensor]) -> None:
        """Leave the padding of the coming batch out."""
        mask = next((spec.name for spec in signature.inputs if spec.role == "mask"), None)
        self.valid = inputs[mask].bool() if mask else None


@contextmanager
def watching(model: nn.Module, sites: Sequence[Site], see: Callable[[str, Tensor], None]) -> Iterator[Watch]:
    """Within the block `see(site, x)` receives x (tokens, features), the valid inputs of each output projection."""
    watch = Watch()

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            see(name, x.reshape(-1, x.shape[-1]) if watch.valid is None else x[watch.valid])

        return hook

    with ExitStack() as stack:
        for site in sites:
            stack.callback(model.get_submodule(site.out).register_forward_pre_hook(hook_for(site.name)).remove)
        yield watch
