"""The page on GPUs, docs/gpu.md, made from what the suite left in bench/results.

python -m bench.suite.report bench/results         prints its tables
python -m bench.suite.report bench/results --docs  puts them into docs/gpu.md of this directory
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bench.stats import Ratio, sound
from deploy_prune.errors import ArtifactError
from deploy_prune.files import atomic_file, read_json

PAGE = Path("docs/gpu.md")
BEGIN, END = "<!-- gpu: made by bench.suite.report -->", "<!-- gpu end -->"
NONE = "No GPU figures yet: `bench/gpu_suite.sh` takes them on a machine that has one, and\n"
NONE += "`python -m bench.suite.report bench/results --docs` writes this section.\n"
FAMILIES = {"family": "fp32", "family-fp16": "fp16", "family-graphs": "fp16, CUDA graph"}


@click.command(help=__doc__)
@click.argument("results", type=click.Path(exists=True, path_type=Path))
@click.option("--docs", is_flag=True, help=f"Put it into {PAGE} of this directory.")
def main(results: Path, docs: bool) -> None:
    text = section(results)
    if not docs:
        click.echo(text)
        return
    with atomic_file(PAGE) as temporary:
        temporary.write_text(replaced(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")


def section(results: Path) -> str:
    """The tables of every device that the suite ran on; what it says where there is none."""
    runs = [folder.parent for folder in sorted(results.glob("*/summary.json"))]
    parts = [_device(folder, read_json(folder / "summary.json")) for folder in runs]
    return "\n".join(part for part in parts if part) or NONE


def replaced(page: str, text: str) -> str:
    """`page` with `text` between the marks. Raises ArtifactError when it has none."""
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ArtifactError("no place for the section", where=str(PAGE), expected=f"{BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{text}{END}{after}"


def _device(folder: Path, summary: dict[str, Any]) -> str:
    if summary["small"]:
        return ""
    found = {
        name: read_json(folder / f"{name}.json") for name in summary["checks"] if (folder / f"{name}.json").is_file()
    }
    lines = [f"## {summary['device']}", "", *_environment(found), "", "| check | | |", "|---|---|---|"]
    lines += [
        f"| {name} | {check['state']} | {_line(found.get(name, {}).get('error', ''))} |"
        for name, check in summary["checks"].items()
    ]
    parts = (
        _families(found),
        _forms(found.get("variants", {})),
        _precisions(found.get("fp16", {})),
        _runtimes(found.get("runtimes", {})),
        _decoders(found.get("decoders", {})),
    )
    for part in parts:
        lines += ["", *part] if part else []
    lines += ["", *_large(found["large"])] if "weights" in found.get("large", {}) else []
    return "\n".join([*lines, ""])


def _environment(found: dict[str, Any]) -> list[str]:
    for name in FAMILIES:
        for cell in found.get(name, {}).get("cells", [])[:1]:
            packages = cell["environment"]["packages"]
            known = [p for p in ("torch", "transformers", "timm") if p in packages]
            drivers = {gpu["driver"] for gpu in cell["environment"]["gpus"]}
            runtime = f"ONNX Runtime {next(iter(cell['sessions'].values()))['version']}"
            told = [f"{cell['device']}, driver {', '.join(drivers)}", runtime, *(f"{p} {packages[p]}" for p in known)]
            return [", ".join(told) + "."]
    return []


def _families(found: dict[str, Any]) -> list[str]:
    cells = [(label, cell) for name, label in FAMILIES.items() for cell in found.get(name, {}).get("cells", [])]
    if not cells:
        return []
    lines = []
    if top := found.get("family", {}).get("ceilings"):
        lines += [f"Ceilings: {top['flops'] / 1e12:.1f} TFLOP/s in fp32 files, {top['bytes'] / 1e9:.0f} GB/s.", ""]
    lines += [
        "| model | batch | sequence | precision | dense p50 ms | half the MACs p50 ms | time / dense | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return [*lines, *(_row(label, cell) for label, cell in cells)]


def _row(label: str, cell: dict[str, Any]) -> str:
    timed = {entry["name"]: entry for entry in cell["latencies"]}
    dense, half = timed["dense"], timed["half"]
    ratio = half["ratio"]
    check = cell["self_check"]
    trusted = "" if sound(Ratio(check["value"], check["low"], check["high"])) else " (untrusted)"
    return (
        f"| {cell['model']} | {cell['batch']} | {cell.get('sequence') or ''} | {label} | {dense['p50_ms']:.2f} | "
        f"{half['p50_ms']:.2f} | {ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] | "
        f"{half['verdict']}{trusted} |"
    )


def _forms(check: dict[str, Any]) -> list[str]:
    if not check.get("cells"):
        return []
    names = [entry["name"] for entry in check["cells"][0]["latencies"] if not entry["name"].endswith("(again)")]
    lines = [
        f"| dense model, {check['cells'][0]['precision']} | batch | sequence | "
        + " | ".join(f"`{name}` p50 ms" for name in names)
        + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for cell in check["cells"]:
        timed = {entry["name"]: entry["p50_ms"] for entry in cell["latencies"]}
        figures = " | ".join(f"{timed[name]:.2f}" for name in names)
        lines.append(f"| {cell['model']} | {cell['batch']} | {cell.get('sequence') or ''} | {figures} |")
    return lines


def _precisions(check: dict[str, Any]) -> list[str]:
    models = {name: entry for name, entry in check.items() if isinstance(entry, dict) and "errors" in entry}
    if not models:
        return []
    lines = ["| half the MACs | precision | error against fp32 | p50 ms (fp32) |", "|---|---|---|---|"]
    for name, entry in models.items():
        timed = {latency["name"]: latency["p50_ms"] for latency in entry["cell"]["latencies"]}
        for precision, error in entry["errors"].items():
            told = f"{error:.1e}" if isinstance(error, float) else _line(error)
            time = f"{timed[precision]:.2f} ({timed['fp32']:.2f})" if precision in timed else ""
            lines.append(f"| {name} | {precision} | {told} | {time} |")
    return lines


def _runtimes(check: dict[str, Any]) -> list[str]:
    told = {name: entry for name, entry in check.items() if isinstance(entry, dict) and {"absent", "error"} & {*entry}}
    if not told:
        return []
    lines = ["| ViT-B cut to half, runtime | error against the CPU's answer | s to build |", "|---|---|---|"]
    for name, entry in told.items():
        if "absent" in entry:
            lines.append(f"| {name} | {_line('not there: ' + entry['absent'])} | |")
        else:
            lines.append(f"| {name} | {entry['error']:.1e} | {entry['session']['build_seconds']:.1f} |")
    return lines


def _decoders(check: dict[str, Any]) -> list[str]:
    told = {name: entry for name, entry in check.items() if isinstance(entry, dict) and "tokens a second" in entry}
    if not told:
        return []
    lines = ["| decoder with cache | logits against torch's | tokens a second, batch 1 |", "|---|---|---|"]
    for name, entry in told.items():
        lines.append(f"| {name} | {entry['logits off by']:.1e} | {entry['tokens a second']:.0f} |")
    return [*lines, "", f"Load of the machine: {check['environment']['load_average'][0]:.1f}."]


def _large(check: dict[str, Any]) -> list[str]:
    return [
        f"The iterated search (`objective=task`) on {check['weights'] / 1e9:.1f}G random weights, "
        f"{check['units']:,} units; steps of "
        f"{check['rows per step']} windows of {check['tokens per row']} tokens, {check['micro batch']} at once: "
        f"{check['seconds setting up']:.0f} s to set up, {check['steps']} steps of {check['seconds per step']:.2f} s, "
        f"{check['FLOP per second'] / 1e12:.0f} TFLOP/s, at most {check['peak bytes'] / 1e9:.1f} GB."
    ]


def _line(text: str) -> str:
    """One line that a cell of a table takes."""
    return " ".join(text.replace("|", "/").split())[:200]


if __name__ == "__main__":
    main()
