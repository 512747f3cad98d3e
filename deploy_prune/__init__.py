"""deploy-prune: one search, a whole family of compact ONNX transformers.

The public names below are imported from their modules when first used, so that `import deploy_prune` costs
nothing and the command line starts at once:

    import deploy_prune as dp
    model = dp.load_model("timm:vit_tiny_patch16_224@weights.safetensors")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from deploy_prune.version import __version__

_WHERE = {
    # what is loaded
    "load_model": "deploy_prune.sources",
    "load_data": "deploy_prune.data",
    "load_task": "deploy_prune.tasks",
    "Task": "deploy_prune.tasks",
    "Batch": "deploy_prune.tasks",
    "Quality": "deploy_prune.tasks",
    # what can be removed
    "Site": "deploy_prune.units",
    "UnitKind": "deploy_prune.units",
    "find_sites": "deploy_prune.adapters",
    # what is decided
    "search": "deploy_prune.methods",
    "calibrate_path": "deploy_prune.calibrating",
    "SolutionPath": "deploy_prune.path",
    "PrunePlan": "deploy_prune.plan",
    "uniform_plan": "deploy_prune.uniform",
    "import_plan": "deploy_prune.foreign",
    "export_plan": "deploy_prune.foreign",
    "refit": "deploy_prune.refitting",
    "recover": "deploy_prune.recovery",
    "train_dynamic": "deploy_prune.dynamic.trained",
    "collect_moments": "deploy_prune.refitting",
    "diff": "deploy_prune.delta",
    "TaskDelta": "deploy_prune.delta",
    # what is made
    "compact": "converters.surgery",
    "save_pruned": "converters.checkpoint",
    "load_pruned": "converters.checkpoint",
    "save_stock": "converters.stock",
    "save_apart": "converters.adapters_apart",
    "load_apart": "converters.adapters_apart",
    "export_onnx": "converters.onnx_export",
    "convert_precision": "converters.precision",
    "export_decoder": "converters.decoder_export",
    "check_parity": "converters.parity",
    "check_decoder": "converters.decoder_parity",
    # what is measured and shipped
    "measure": "bench.timing",
    "verify": "deploy_prune.release.verify",
    "gate": "deploy_prune.release.gate",
    "load_rules": "deploy_prune.release.rules",
    "compare_bundles": "deploy_prune.release.versions",
    "sign": "deploy_prune.release.signing",
    "write_report": "deploy_prune.release.report",
    "reproduce": "deploy_prune.release.reproduce",
    "latency_plans": "deploy_prune.latency.api",
    "Place": "deploy_prune.latency.place",
    # a run as data
    "Recipe": "deploy_prune.recipe",
    "load_recipe": "deploy_prune.recipe",
    "run_recipe": "deploy_prune.pipeline",
    # what can go wrong
    "DeployPruneError": "deploy_prune.errors",
}

__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    from bench.timing import measure
    from converters.adapters_apart import load_apart, save_apart
    from converters.checkpoint import load_pruned, save_pruned
    from converters.decoder_export import export_decoder
    from converters.decoder_parity import check_decoder
    from converters.onnx_export import export_onnx
    from converters.parity import check_parity
    from converters.precision import convert_precision
    from converters.stock import save_stock
    from converters.surgery import compact
    from deploy_prune.adapters import find_sites
    from deploy_prune.calibrating import calibrate_path
    from deploy_prune.data import load_data
    from deploy_prune.delta import TaskDelta, diff
    from deploy_prune.dynamic.trained import train_dynamic
    from deploy_prune.errors import DeployPruneError
    from deploy_prune.foreign import export_plan, import_plan
    from deploy_prune.latency.api import latency_plans
    from deploy_prune.latency.place import Place
    from deploy_prune.methods import search
    from deploy_prune.path import SolutionPath
    from deploy_prune.pipeline import run_recipe
    from deploy_prune.plan import PrunePlan
    from deploy_prune.recipe import Recipe, load_recipe
    from deploy_prune.recovery import recover
    from deploy_prune.refitting import collect_moments, refit
    from deploy_prune.release.gate import gate
    from deploy_prune.release.report import write_report
    from deploy_prune.release.reproduce import reproduce
    from deploy_prune.release.rules import load_rules
    from deploy_prune.release.signing import sign
    from deploy_prune.release.verify import verify
    from deploy_prune.release.versions import compare_bundles
    from deploy_prune.sources import load_model
    from deploy_prune.tasks import Batch, Quality, Task, load_task
    from deploy_prune.uniform import uniform_plan
    from deploy_prune.units import Site, UnitKind


def __getattr__(name: str) -> Any:
    module = _WHERE.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
