"""Torch-Pruning (DepGraph, arXiv 2301.12900) at the settings of its own transformer examples.

Global ranking over all groups, head dimensions pruned alike in all heads of a layer (its default), residual stream left
alone (`--bottleneck` in its examples): the same parameters are open to it as to everyone. Its pruning ratio counts
channels, so it is searched for by bisection until the parameters that remain are those asked for. Under grouped queries
with rotary embedding it gets the feed-forwards only: head dimensions cannot leave there without breaking the rotation
pairs, and its head pruning keeps every key/value head.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench.peers import NotSupported, OutOfReach, Prune, Pruned
from deploy_prune.adapters import find_sites
from deploy_prune.budget import count_params
from deploy_prune.layers import layer_at
from deploy_prune.units import SiteKind, UnitKind

if TYPE_CHECKING:
    from deploy_prune.tasks import Batch, Task
    from deploy_prune.units import Site

TRIES = 10  # halvings of the pruning ratio: to 1/1024 of the channels


def pruner(criterion: str) -> Prune:
    runs: dict[tuple[int, int, int, int], Run] = {}

    def prune(model: nn.Module, task: Task, examples: int, batch_size: int, params: int, seed: int) -> Pruned:
        key = (id(model), examples, batch_size, seed)
        if key not in runs:
            runs[key] = Run(model, task, criterion, examples, batch_size, seed)
        return runs[key].at(params)

    return prune


class Run:
    """One model and criterion: gradients are taken once, then any number of budgets is met."""

    def __init__(self, model: nn.Module, task: Task, criterion: str, examples: int, batch_size: int, seed: int) -> None:
        self.task, self.criterion = task, criterion
        self.sites = find_sites(model)
        self.open = tuple(s for s in self.sites if s.query_heads_per_unit == 1)
        self.model = copy.deepcopy(model).eval().requires_grad_(True)
        self.device = next(model.parameters()).device
        self.example = next(iter(task.calibration(1, limit=1, seed=seed))).to(self.device)
        self.made: dict[int, tuple[int, float, nn.Module]] = {}
        self.squares: dict[str, Tensor] = {}
        self.fisher: dict[str, Tensor] = {}
        batches = task.calibration(batch_size, examples, seed)
        if criterion == "taylor":
            self._accumulate(batches)
        elif criterion in ("hessian", "obdc"):
            self._per_example(batches)
        elif criterion != "magnitude":
            raise ValueError(f"no criterion {criterion!r}")

    def at(self, params: int) -> Pruned:
        """The largest model of at most `params` parameters that still runs. Raises OutOfReach when there is none.

        Where its ranking empties a layer the model it leaves does not run; such ratios count as too high.
        """
        low, high = 0.0, 1.0
        best = self.made.get(params)
        broken: str | None = None
        for _ in range(0 if best else TRIES):
            ratio = (low + high) / 2
            made = self.pruned(ratio)
            count = count_params(made)
            if count > params:
                low = ratio
                continue
            high = ratio
            try:
                with torch.no_grad():
                    self.task.signature.call(made.eval(), self.example.inputs)
            except RuntimeError as error:
                broken = str(error).splitlines()[0]
                continue
            if best is None or count >= best[0]:
                best = count, ratio, made
        if best is None:
            reason = f"its models do not run: {broken}" if broken else "no pruning ratio leaves as few parameters"
            raise OutOfReach(f"{_version()}: {reason}")
        self.made[params] = best
        return Pruned(best[2].eval().requires_grad_(False), {"pruning_ratio": best[1], **SETTINGS[self.criterion]})

    def pruned(self, ratio: float) -> nn.Module:
        """The model that Torch-Pruning makes at a pruning ratio, with the attributes its examples set afterwards."""
        import torch_pruning as tp

        model = copy.deepcopy(self.model)
        grads = {name: p.grad for name, p in self.model.named_parameters()}
        for name, p in model.named_parameters():
            p.grad = None if grads[name] is None else grads[name].clone()  # type: ignore[union-attr]
        heads = _num_heads(model, self.open)
        writers = [layer_at(model, site.out) for site in self.open]
        importance = self._importance(tp, model)
        _unfuse(model, self.open)
        with _quiet():
            engine = tp.pruner.BasePruner(
                model,
                self.example.inputs,
                importance=importance,
                global_pruning=True,
                pruning_ratio=ratio,
                ignored_layers=[*writers, *_others(model, self.open)],
                num_heads=heads,
                forward_fn=lambda m, inputs: self.task.signature.call(m, inputs),
                output_transform=lambda out: out.sum(),
            )
            for group in engine.step(interactive=True):
                group.prune()
        _set_attributes(model, self.open)
        return model

    def _importance(self, tp: Any, model: nn.Module) -> Any:
        kind = {
            "magnitude": tp.importance.GroupMagnitudeImportance,
            "taylor": tp.importance.GroupTaylorImportance,
            "hessian": tp.importance.GroupHessianImportance,
            "obdc": tp.importance.OBDCImportance,
        }[self.criterion]
        importance = kind(**SETTINGS[self.criterion])
        parameters = dict(model.named_parameters())
        if self.criterion == "hessian":
            # Its accumulate_grad keeps the last example only (it looks parameters up by name but stores them by
            # tensor); we hand it the mean over all of them, which its documentation promises.
            importance._accu_grad = {parameters[name]: s.clone() for name, s in self.squares.items()}
            importance._counter = dict.fromkeys(importance._accu_grad, self.rows)
        if self.criterion == "obdc":
            layers = dict(model.named_modules())
            importance.Fisher = {layers[name]: F.clone() for name, F in self.fisher.items()}
            importance.modules = list(importance.Fisher)
            importance.steps = 1
        return importance

    def _accumulate(self, batches: Iterable[Batch]) -> None:
        """p.grad = Σ over the calibration examples of ∂ℓ/∂p."""
        for batch in batches:
            self._loss(batch).sum().backward()

    def _per_example(self, batches: Iterable[Batch]) -> None:
        """Σ over examples of (∂ℓ/∂p)² for every weight of a site, from its layer's inputs and output gradients.

        g_n = Σ_t δ_nt x_ntᵀ is example n's gradient of a linear layer; both criteria are built on g_n². OBDC's own
        accumulator is the same quantity.
        """
        names = {name for site in self.open for name, _ in site.axes()}
        layers = {name: layer_at(self.model, name) for name in sorted(names)}
        saved: dict[str, Tensor] = {}
        self.rows = 0

        def watch(name: str, layer: nn.Module) -> Any:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                x = inputs[0].detach().flatten(1, -2) if inputs[0].dim() > 2 else inputs[0].detach().unsqueeze(1)

                def grad(δ: Tensor) -> None:
                    d = δ.flatten(1, -2) if δ.dim() > 2 else δ.unsqueeze(1)
                    g = torch.einsum("nto,nti->noi", d, x)
                    total = g.square().sum(0)
                    saved[name] = saved[name] + total if name in saved else total

                output.register_hook(grad)

            return layer.register_forward_hook(hook)

        handles = [watch(name, layer) for name, layer in layers.items() if isinstance(layer, nn.Module)]
        try:
            for batch in batches:
                self._loss(batch).sum().backward()
                self.rows += len(batch)
        finally:
            for handle in handles:
                handle.remove()
        self.squares = {f"{name}.weight": s for name, s in saved.items()}
        self.fisher = {name: s / self.rows for name, s in saved.items()}

    def _loss(self, batch: Batch) -> Tensor:
        here = batch.to(self.device)
        return self.task.loss(self.task.signature.call(self.model, here.inputs).float(), here)


_LINEAR: dict[str, Any] = {"target_types": [nn.Linear]}
SETTINGS: dict[str, dict[str, Any]] = {
    "magnitude": {"p": 2, "group_reduction": "mean", "normalizer": "mean"},
    "taylor": {"group_reduction": "mean", "normalizer": "mean"},
    "hessian": {"group_reduction": "mean", "normalizer": "mean", **_LINEAR},
    "obdc": {"group_reduction": "mean", "normalizer": "mean", **_LINEAR},
}


def _num_heads(model: nn.Module, sites: tuple[Site, ...]) -> dict[nn.Module, int]:
    found: dict[nn.Module, int] = {}
    for site in sites:
        if site.kind is SiteKind.ATTENTION:
            for s in site.slices[UnitKind.HEAD]:
                layer = layer_at(model, s.layer)
                if s.axis == "out" and isinstance(layer, nn.Linear):
                    found[layer] = site.heads
    return found


def _others(model: nn.Module, sites: tuple[Site, ...]) -> list[nn.Module]:
    """Linear and convolution layers outside the sites: classifiers, poolers, patch embeddings."""
    own = {name for site in sites for name, _ in site.axes()}
    return [m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and n not in own]


def _unfuse(model: nn.Module, sites: tuple[Site, ...]) -> None:
    """timm's fused attention scales by the width its heads have left, which alone changes the output; the unfused form
    keeps the dense model's scale."""
    for site in sites:
        if site.kind is SiteKind.ATTENTION and hasattr(attention := model.get_submodule(site.name), "fused_attn"):
            attention.fused_attn = False  # type: ignore[assignment]


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Unwrapped parameters.*")
        yield


def _set_attributes(model: nn.Module, sites: tuple[Site, ...]) -> None:
    """What Torch-Pruning's examples set by hand after pruning: head counts and widths, per library class."""
    for site in sites:
        if site.kind is not SiteKind.ATTENTION:
            continue
        attention: Any = model.get_submodule(site.name)
        out: Any = model.get_submodule(site.out)
        dim = out.in_features // site.heads
        kind = type(attention).__name__
        if hasattr(attention, "head_dim") and hasattr(attention, "qkv"):
            attention.head_dim, attention.attn_dim = dim, out.in_features
        elif kind == "DistilBertSelfAttention":
            attention.attention_head_size, attention.dim = dim, out.in_features
        elif kind == "BertAttention":
            own: Any = attention.self
            own.attention_head_size, own.all_head_size = dim, out.in_features
        else:
            raise NotSupported(f"{_version()}: no example says how {kind} is fixed after pruning")


def _version() -> str:
    from importlib import metadata

    return f"torch-pruning {metadata.version('torch-pruning')}"
