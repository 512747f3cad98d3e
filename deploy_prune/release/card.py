"""The model card: a bundle's manifest in words and tables, for the people who find the directory."""

from __future__ import annotations

import re
from collections.abc import Sequence

from deploy_prune.release.manifest import DecoderEntry, LatencyEntry, Manifest, Member, QualityEntry


def model_card(manifest: Manifest) -> str:
    """README.md of the bundle, Markdown; depends on the manifest alone."""
    task = str(manifest.task.get("name", "unknown"))
    parts = [
        _metadata(manifest),
        f"# {manifest.name}",
        f"A family of {len(manifest.members)} ONNX models cut from `{manifest.base.reference}` "
        f"({manifest.base.parameters:,} parameters) by one deploy-prune search. Task: {task}. "
        f"Every file is {_operators(manifest)} and needs none of deploy-prune to run; each was proved equal to the "
        "torch model it was exported from.",
        "## Members",
        _table(*_members(manifest)),
        "`asked` is the budget that was asked for; parameters, MACs and bytes are exact counts. "
        "Bytes are those of the ONNX file.",
    ]
    if any(member.twin for member in manifest.members):
        parts.append(
            "A member `NAME.PRECISION`, as `NAME.fp16`, was made from `NAME` and compared with it, not with torch: "
            "every stored weight is that of `NAME` rounded, and predictions agree as the manifest says. "
            "The half precisions are for GPUs: on the CPU onnxruntime computes fp16 in fp32 and does not run bf16."
        )
    if any(member.latency for member in manifest.members):
        parts += [
            "## Latency",
            _table(*_latency(manifest)),
            "Median and 99th percentile in milliseconds per call. `ratio` is to the dense model timed in the "
            "same run, with its 95 % interval; below 1 is faster. Raw samples are in `bench/`.",
        ]
    if decoders := [member.decoder for member in manifest.members if member.decoder]:
        parts += [
            "## Decoding",
            _table(("directory", "caches", "bytes", "parity error", "onnxruntime-genai"), _decoders(decoders)),
            "Each directory holds one graph for prefill (an empty past) and decoding with its key/value caches, and "
            "the tokenizer: `deploy-prune generate . --member NAME --prompt ...`."
            + (" It gives the logits of the last new token alone." if decoders[0].outputs[0].shape[1] == 1 else ""),
        ]
    parts += [
        "## Inputs and output",
        _table(
            ("name", "type", "shape", "role"),
            [(t.name, t.dtype, "×".join(map(str, t.shape)), t.role) for t in manifest.inputs]
            + [(manifest.output.name, manifest.output.dtype, "×".join(map(str, manifest.output.shape)), "output")],
        ),
        "## Use",
        "```\npython run.py --help\n```",
        "`run.py` asks a member, with onnxruntime and numpy alone (images also need pillow, texts tokenizers), and "
        "prepares images and texts as the manifest says. `report.html` shows how to load a member in Python, C++ and "
        "Triton, and the family in charts; it opens offline.",
        "## Check",
        "```\ndeploy-prune verify .\n```",
        "compares every file with its hash in `manifest.json` and every model with the outputs stored in `samples/`.",
        "## Made with",
        ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()) if version) + ".",
        f"SHA-256 of the dense weights: `{manifest.base.weights_sha256}`.",
        "## Licence and origin",
        _table(
            ("", "licence", "origin", "stated by"),
            [
                (name, origin.license or "unknown", origin.source or "unknown", origin.stated_by or "–")
                for name, origin in (("dense model", manifest.provenance.model), ("data", manifest.provenance.data))
            ],
        ),
        "The licence of the dense model and of its data applies to what was cut from it."
        + ("" if manifest.provenance.model.license else " That of the dense model is not known: find it out first."),
    ]
    return "\n\n".join(parts) + "\n"


_PIPELINES = {
    "image-classification": "image-classification",
    "text-classification": "text-classification",
    "prompted-classification": "text-classification",
    "sentence-embedding": "sentence-similarity",
    "causal-lm": "text-generation",
    "image-text": "zero-shot-image-classification",
}


def _operators(manifest: Manifest) -> str:
    """Whose operators the files have, in words."""
    from converters.precision.formats import WEIGHT_ONLY

    own = [m.name for m in manifest.members if m.variant == "ort" or m.precision in WEIGHT_ONLY]
    return f"ONNX, {', '.join(own)} with operators of ONNX Runtime's own," if own else "standard ONNX"


def _metadata(manifest: Manifest) -> str:
    """The YAML head of the card that the Hugging Face Hub reads. The licence is the dense model's."""
    import yaml

    from deploy_prune.provenance import HUB_LICENSES

    task = str(manifest.task.get("name"))
    data: dict[str, object] = {"library_name": "onnx", "tags": ["onnx", "pruned", "deploy-prune"]}
    stated = manifest.provenance.model.license
    data["license"] = "unknown" if stated is None else stated.lower() if stated.lower() in HUB_LICENSES else "other"
    if data["license"] == "other":
        data["license_name"] = stated
    scheme, _, base = manifest.base.reference.partition(":")
    base = base.partition("?")[0]
    if scheme == "hf" and re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        data["base_model"] = base
    if task in _PIPELINES:
        data["pipeline_tag"] = _PIPELINES[task]
        results = [
            {
                "task": {"type": _PIPELINES[task]},
                "dataset": {"name": str(manifest.task.get("evaluation")), "type": "custom"},
                "metrics": [
                    {"type": m.quality.metric, "value": m.quality.value, "name": f"{m.quality.metric} ({m.name})"}
                ],
            }
            for m in manifest.members
            if m.quality is not None
        ]
        if results:
            data["model-index"] = [{"name": manifest.name, "results": results}]
    return "---\n" + yaml.safe_dump(data, sort_keys=False, allow_unicode=True) + "---"


def _members(manifest: Manifest) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    dense = manifest.dense
    columns = ["model", "asked", "parameters", "MACs", "bytes", "parity error"]
    if dense.quality is not None:
        columns.insert(5, f"{dense.quality.metric} (95 %)")
    trained = dense.quality is not None and any(member.recovery for member in manifest.members)
    if trained:
        columns.insert(5, "before recovery")
    rows = []
    for member in manifest.members:
        costs = member.achieved
        asked = f"{member.asked.budget} {member.asked.value:g}" if member.asked else "–"
        row = [
            member.name,
            asked,
            f"{costs.params:,}" if costs else "–",
            f"{costs.macs:,}" if costs else "–",
            f"{member.bytes:,}",
            f"{member.parity['error']:.0e}" if "error" in member.parity else "–",
        ]
        if dense.quality is not None:
            row.insert(5, _quality(member.quality))
        if trained:
            row.insert(5, _quality(member.recovery.quality_before) if member.recovery else "–")
        rows.append(row)
    return columns, rows


def _decoders(decoders: Sequence[DecoderEntry]) -> list[Sequence[str]]:
    return [
        (
            decoder.directory,
            str(len(decoder.caches)),
            f"{decoder.bytes:,}",
            f"{decoder.parity['error']:.0e}",
            f"no: {decoder.genai_refused}" if decoder.genai_refused else "serves it",
        )
        for decoder in decoders
    ]


def _quality(quality: QualityEntry | None) -> str:
    if quality is None:
        return "–"
    return f"{quality.value:.4g} ({quality.interval[0]:.4g}–{quality.interval[1]:.4g}, n={quality.n})"


def _latency(manifest: Manifest) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    columns = ("model", "runtime", "batch", "sequence", "past", "p50 ms", "p99 ms", "ratio (95 %)", "verdict")
    return columns, [_cell(member, entry) for member in manifest.members for entry in member.latency]


def _cell(member: Member, entry: LatencyEntry) -> Sequence[str]:
    verdict = entry.verdict if entry.trusted else f"{entry.verdict} (self-check failed: do not trust)"
    return (
        member.name,
        entry.runtime,
        str(entry.batch),
        "–" if entry.sequence is None else str(entry.sequence),
        "–" if entry.past is None else str(entry.past),
        f"{entry.p50_ms:.3g}",
        f"{entry.p99_ms:.3g}",
        f"{entry.ratio.value:.3f} ({entry.ratio.low:.3f}–{entry.ratio.high:.3f})",
        verdict,
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
