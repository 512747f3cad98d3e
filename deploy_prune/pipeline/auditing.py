"""Whether an exported graph is what the plan says: its bytes of weights, and, layer by layer, its audit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy_prune.errors import ParityError
from deploy_prune.pipeline.setup import Setup
from deploy_prune.plan import PrunePlan


def audit_of(setup: Setup, onnx: Path, plan: PrunePlan | None = None, dense: Any = None) -> dict[str, Any]:
    """What ONNX Runtime makes of the file, judged by the plan and by the `dense` model's audit (None: this is it)."""
    from bench.audit import GraphAudit, judge_graph, layers_of, read_graph
    from deploy_prune.units import UnitKind

    found = read_graph(onnx, layers_of(setup.sites))
    if plan is None or dense is None:
        return judge_graph(found, found, {}, [])
    heads, vanished = {}, []
    for site in setup.sites:
        kept = plan.keep.get(site.name, {})
        if any(len(units) == 0 for units in kept.values()):
            vanished.append(site.name)
        if site.heads and UnitKind.HEAD in kept:
            heads[site.name] = len(kept[UnitKind.HEAD]) * site.heads // site.kv_heads
    return judge_graph(found, GraphAudit.of(dense), heads, vanished)


def stored_bytes(exported: Mapping[str, Any]) -> int:
    """Bytes of model weights in an exported file, by its report."""
    return sum(exported["initializers"]["weights"].values())


def check_bytes(name: str, plan: PrunePlan, exported: Mapping[str, Any], unread: int) -> None:
    """The file must hold exactly the weights that the plan announced."""
    assert plan.achieved is not None
    announced, stored = plan.achieved.bytes - unread, stored_bytes(exported)
    if stored != announced:
        raise ParityError(
            "the exported weights are not those the plan announced",
            where=name,
            expected=f"{announced} bytes",
            got=f"{stored} bytes",
            remedy="A layer kept its old shape, or a weight is stored twice.",
        )
