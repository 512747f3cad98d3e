"""An adapter knows one architecture family: where its sites are and which attributes follow a cut."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from deploy_prune.errors import UnsupportedModelError
from deploy_prune.units import PER_HEAD, Site, SiteKind, Slice, UnitKind

if TYPE_CHECKING:
    from torch import Tensor, nn


class Adapter(ABC):
    """Stateless; one instance per family in the registry."""

    name: ClassVar[str]

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Whether `model` is of this family, decided by class, never by guessing attribute names."""

    @abstractmethod
    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        """Every prunable site in model order. Raises UnsupportedModelError listing the sites not understood."""

    @abstractmethod
    def resize(self, model: nn.Module, site: Site, kept: Mapping[UnitKind, Sequence[int]]) -> None:
        """Set what the cut at `site` made stale (head counts, widths); its layers are cut already.

        `kept` holds the units that stay, by their indices at the uncut site. Where query/key and value widths differ
        from what the library's own class can compute, the module becomes a subclass that can.
        """

    @abstractmethod
    def vanish(self, model: nn.Module, site: Site, bias: Tensor | None) -> None:
        """Put `Vanished(bias)` where the sublayer was: only the bias of the output projection stays of `site`."""

    def untouched(self, model: nn.Module) -> list[tuple[str, str]]:
        """Modules that hold parameters and offer no units, each with the reason: [("head", "the classifier")].

        What is neither here nor in a site is listed by `deploy-prune inspect` without a reason.
        """
        return []


# Why a query/key dimension cannot leave by itself.
NORMED = "the norm over a head's query and key mixes all of its dimensions"


def uneven_widths(attention: Any, site: Site, kept: Mapping[UnitKind, Sequence[int]], cls: type[nn.Module]) -> bool:
    """Make `attention` a `cls`, which computes with `qk_width` and `vo_width`, when qk or vo units left it.

    Returns whether it is one now.
    """
    per_head = {kind: len(kept[kind]) // len(kept[UnitKind.HEAD]) for kind in PER_HEAD if kind in site.counts}
    widths = {
        kind: full * per_head[kind] // site.counts[kind] if kind in per_head else full
        for kind, full in ((UnitKind.QK, site.qk_width), (UnitKind.VO, site.vo_width))
    }
    cut = any(per_head[kind] < site.counts[kind] for kind in per_head)
    if cut or isinstance(attention, cls):
        attention.__class__ = cls
        attention.qk_width, attention.vo_width = widths[UnitKind.QK], widths[UnitKind.VO]
    return isinstance(attention, cls)


def module_at(model: nn.Module, name: str) -> Any:
    """The submodule `name`, untyped: an adapter knows its class and its attributes, the type checker does not."""
    return model.get_submodule(name)


def attention_site(
    name: str,
    *,
    heads: int,
    head_dim: int,
    out: str,
    query: str,
    key: str,
    value: str,
    kv_heads: int | None = None,
    vo_width: int | None = None,
    rotary: bool = False,
    stacked: bool = False,
    alone: tuple[str, ...] = (),
    with_heads: tuple[Slice, ...] = (),
    value_bias: str | None = None,
    serving: tuple[str, ...] = (),
    limits: Mapping[UnitKind, str] | None = None,
) -> Site:
    """An attention site: `heads` query heads of `head_dim` query/key features sharing `kv_heads` key/value heads.

    `stacked` says that `query`, `key` and `value` are one layer that makes the three below each other. Under `rotary`
    embedding dimension i turns with i + head_dim / 2, so a qk unit is that pair. `with_heads` are further slices that
    leave with a head (a column of a bias table). `value_bias` is the values' bias where that is a parameter by itself.
    `serving` names layers that no cut shortens and that leave with the whole site. A kind in `limits` is not offered,
    for the reason given there.
    """
    kv_heads = kv_heads or heads
    vo_width = vo_width or head_dim
    group = heads // kv_heads
    q_wide, v_wide = group * head_dim, group * vo_width
    starts = (0, heads * head_dim, (heads + kv_heads) * head_dim) if stacked else (0, 0, 0)
    q, k, v = starts
    biases = () if value_bias is None else (value_bias,)
    head = (
        Slice(query, "out", q_wide, start=q, repeat=((q_wide, 1),)),
        Slice(key, "out", head_dim, start=k, repeat=((head_dim, 1),)),
        Slice(value, "out", vo_width, start=v, repeat=((vo_width, 1),)),
        *(Slice(b, "out", vo_width, repeat=((vo_width, 1),)) for b in biases),
        Slice(out, "in", v_wide, repeat=((v_wide, 1),)),
        *with_heads,
        *(Slice(layer, "out", repeat=((0, 1),)) for layer in serving),
    )
    pair = ((2, head_dim // 2),) if rotary else ()
    qk = (
        Slice(query, "out", lane=q_wide, start=q, repeat=((group, head_dim), *pair)),
        Slice(key, "out", lane=head_dim, start=k, repeat=pair),
    )
    vo = (
        Slice(value, "out", lane=vo_width, start=v),
        *(Slice(b, "out", lane=vo_width) for b in biases),
        Slice(out, "in", lane=v_wide, repeat=((group, vo_width),)),
    )
    counts = {UnitKind.HEAD: kv_heads, UnitKind.QK: head_dim // (2 if rotary else 1), UnitKind.VO: vo_width}
    slices = {UnitKind.HEAD: head, UnitKind.QK: qk, UnitKind.VO: vo}
    limits = dict(limits or {})
    return Site(
        name,
        SiteKind.ATTENTION,
        {kind: n for kind, n in counts.items() if kind not in limits},
        {kind: s for kind, s in slices.items() if kind not in limits},
        out,
        heads=heads,
        kv_heads=kv_heads,
        qk_width=head_dim,
        vo_width=vo_width,
        alone=alone,
        limits=limits or None,
    )


def feed_forward_site(
    name: str, *, neurons: int, out: str, inputs: tuple[str, ...], stacked: bool = False, alone: tuple[str, ...] = ()
) -> Site:
    """A feed-forward site; a unit is one hidden dimension, made by every layer of `inputs` (two when gated).

    `stacked` says that the one layer of `inputs` makes gate and value below each other.
    """
    made = tuple(Slice(layer, "out", repeat=((2, neurons),) if stacked else ()) for layer in inputs)
    neuron = (*made, Slice(out, "in"))
    return Site(name, SiteKind.FEED_FORWARD, {UnitKind.NEURON: neurons}, {UnitKind.NEURON: neuron}, out, alone=alone)


def layer_problems(model: nn.Module, site: Site) -> list[str]:
    """Reasons why the layers of `site` are not what a cut understands."""
    from deploy_prune.layers import is_cuttable, layer_at, width

    problems = []
    for name, axis in site.axes():
        layer = layer_at(model, name)
        if not is_cuttable(layer):
            problems.append(
                f"{site.name}: {name} is a {type(layer).__name__}, expected torch.nn.Linear or transformers' Conv1D"
            )
            continue
        last = max(
            int(s.table(site.lanes(kind), n).max(initial=-1))
            for kind, n in site.counts.items()
            for s in site.slices[kind]
            if (s.layer, s.axis) == (name, axis)
        )
        if last >= width(layer, axis):
            problems.append(f"{site.name}: {name} has {width(layer, axis)} {axis}put features, expected {last + 1}")
    return problems


def checked(model: nn.Module, family: str, sites: list[Site], problems: list[str]) -> tuple[Site, ...]:
    """`sites` when nothing is wrong. Raises UnsupportedModelError with every problem otherwise."""
    problems = problems + [p for site in sites for p in layer_problems(model, site)]
    if problems or not sites:
        raise UnsupportedModelError(
            f"{len(problems) or 'all'} sites not understood",
            where=f"{type(model).__name__} (adapter {family})",
            problems=problems or ["the model has no attention or feed-forward site"],
            remedy="Write an adapter for this variant (CONTRIBUTING.md, 'To add an architecture').",
        )
    return tuple(sites)
