"""Tiny models as they ship: their signatures and, exported once per session, their ONNX files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from converters.onnx_export import ExportReport, export_onnx
from deploy_prune.signature import Signature, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

MODELS = ("tiny_vit", "tiny_bert", "tiny_distilbert", "tiny_llama")
TEXT = (
    TensorSpec("input_ids", "int64", ("batch", "sequence"), "ids", high=99),
    TensorSpec("attention_mask", "int64", ("batch", "sequence"), "mask"),
)


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def _decoder_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return model(**inputs, use_cache=False).logits


def _embedding(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    import torch

    hidden = model.bert(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=-1)


SIGNATURES = {
    "tiny_vit": Signature(
        (TensorSpec("images", "float32", ("batch", 3, 32, 32)),),
        TensorSpec("logits", "float32", ("batch", 5)),
        lambda model, x: model(x["images"]),
    ),
    "tiny_bert": Signature(TEXT, TensorSpec("logits", "float32", ("batch", 3)), _logits),
    "tiny_distilbert": Signature(TEXT, TensorSpec("logits", "float32", ("batch", 2)), _logits),
    "tiny_llama": Signature(TEXT, TensorSpec("logits", "float32", ("batch", "sequence", 99)), _decoder_logits),
}
EMBEDDING = Signature(TEXT, TensorSpec("embeddings", "float32", ("batch", 32)), _embedding)

_ROOM = tempfile.TemporaryDirectory(prefix="deploy-prune-tests-")
_reports: dict[str, ExportReport] = {}


def exported(name: str, model: nn.Module, signature: Signature | None = None) -> tuple[Path, ExportReport]:
    """The ONNX file of `model`, which must be the same for every call with this `name`; do not write to it."""
    path = Path(_ROOM.name) / f"{name}.onnx"
    if name not in _reports:
        _reports[name] = export_onnx(model, path, signature or SIGNATURES[name])
    return path, _reports[name]


@cache
def session(path: Path):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run_onnx(path: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    import torch

    return torch.from_numpy(session(path).run(None, {k: v.numpy() for k, v in inputs.items()})[0])


_BUNDLES: dict[str, Path] = {}


def bundle_of(tiny_vit: nn.Module, base: Path) -> Path:
    """A fresh copy, below `base`, of a bundle of the tiny ViT: dense and one member with checkpoint and samples."""
    if "vit" not in _BUNDLES:
        _BUNDLES["vit"] = _build_bundle(tiny_vit, Path(_ROOM.name) / "bundle")
    return Path(shutil.copytree(_BUNDLES["vit"], base / "bundle"))


def _build_bundle(model: nn.Module, bundle: Path) -> Path:
    from converters.checkpoint import save_pruned
    from converters.parity import check_parity
    from converters.surgery import compact
    from deploy_prune.adapters import find_sites
    from deploy_prune.architecture import weights_sha256
    from deploy_prune.plan import Costs, Target, plan_from_units
    from deploy_prune.release import bundle as bundling
    from deploy_prune.release.manifest import BaseModelEntry, Manifest, QualityEntry, SamplesEntry, TensorEntry
    from deploy_prune.release.samples import record_samples
    from deploy_prune.units import PER_HEAD, groups

    sites, sha256, signature = find_sites(model), weights_sha256(model), SIGNATURES["tiny_vit"]
    # without the first head, all of its dimensions, and the first neuron
    kept = {(s.name, k): range(s.counts[k] if k in PER_HEAD else 1, s.units(k)) for s, k in groups(sites)}
    costs = Costs(sparsity=0.02, params=1, macs=1, bytes=4, units={"head": 4, "neuron": 190})
    plan = plan_from_units(
        "timm:tiny",
        sha256,
        sites,
        kept,
        achieved=costs,
        asked=Target(budget="sparsity", value=0.02, kinds=("head", "neuron"), align=1),
    )
    members = []
    for name, form, own in (("dense", model, None), ("s02", compact(model, plan), plan)):
        path, report = exported("tiny_vit" if own is None else "tiny_vit_s02", form, signature)
        bundling.place(bundle, f"models/{name}.onnx", path)
        (bundle / "samples").mkdir(exist_ok=True)
        record_samples(bundle / f"samples/{name}.safetensors", form, signature)
        if own is not None:
            (bundle / "plans").mkdir()
            own.save(bundle / f"plans/{name}.json")
            save_pruned(form, own, bundle / f"checkpoints/{name}")
        members.append(
            bundling.member_from(
                name,
                report.to_json(),
                parity=check_parity({"torch": form, "onnx": path}, signature).to_json(),
                samples=SamplesEntry(file=f"samples/{name}.safetensors", tolerance=1e-4),
                quality=QualityEntry(metric="top1", value=0.75, n=8, interval=(0.4, 0.9), higher_is_better=True),
                **(
                    {}
                    if own is None
                    else {
                        "plan": f"plans/{name}.json",
                        "checkpoint": f"checkpoints/{name}",
                        "asked": own.asked,
                        "achieved": own.achieved,
                    }
                ),
            )
        )
    described = signature.describe()
    bundling.finish(
        bundle,
        Manifest(
            name="tiny",
            base=BaseModelEntry(
                reference="timm:tiny", weights_sha256=sha256, parameters=sum(p.numel() for p in model.parameters())
            ),
            task={"name": "image-classification"},
            recipe={"model": "timm:tiny"},
            versions={"deploy-prune": "0.1.0"},
            environment={"cpu": "any"},
            inputs=[TensorEntry(**t) for t in described["inputs"]],
            output=TensorEntry(**described["output"]),
            members=members,
        ),
    )
    return bundle
