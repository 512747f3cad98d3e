"""The README's section on GPUs, made from what the suite left in bench/results.

python -m bench.suite.report bench/results           prints it
python -m bench.suite.report bench/results --readme  puts it into README.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deploy_prune.errors import ArtifactError
from deploy_prune.files import atomic_file, read_json

BEGIN, END = "<!-- gpu: made by bench.suite.report -->", "<!-- gpu end -->"
NONE = "No GPU figures yet: no GPU was at hand. `bench/gpu_suite.sh` takes them on a machine that has one, and\n"
NONE += "`python -m bench.suite.report bench/results --readme` writes this section.\n"


@click.command(help=__doc__)
@click.argument("results", type=click.Path(exists=True, path_type=Path))
@click.option("--readme", is_flag=True, help="Put it into README.md of this directory.")
def main(results: Path, readme: bool) -> None:
    text = section(results)
    if not readme:
        click.echo(text)
        return
    file = Path("README.md")
    with atomic_file(file) as temporary:
        temporary.write_text(replaced(file.read_text(encoding="utf-8"), text), encoding="utf-8")


def section(results: Path) -> str:
    """A table for every device that the suite ran on; what it says where there is none."""
    runs = [folder.parent for folder in sorted(results.glob("*/summary.json"))]
    parts = [_device(folder, read_json(folder / "summary.json")) for folder in runs]
    return "\n".join(part for part in parts if part) or NONE


def replaced(readme: str, text: str) -> str:
    """`readme` with `text` between the marks. Raises ArtifactError when it has none."""
    before, mark, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ArtifactError("no place for the section", where="README.md", expected=f"{BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{text}{END}{after}"


def _device(folder: Path, summary: dict[str, Any]) -> str:
    if summary["small"]:
        return ""
    checks = ", ".join(f"{name} {check['state']}" for name, check in summary["checks"].items())
    lines = [f"**{summary['device']}**, {summary['seconds']:.0f} s: {checks}.", ""]
    file = folder / "family.json"
    found = read_json(file) if file.is_file() else {}
    if found.get("cells"):
        top = found["ceilings"]
        lines += [
            f"Ceilings: {top['flops'] / 1e12:.1f} TFLOP/s fp32, {top['bytes'] / 1e9:.0f} GB/s.",
            "",
            "| model | batch | sequence | dense p50 ms | half the MACs p50 ms | time / dense | verdict |",
            "|---|---|---|---|---|---|---|",
            *(_row(cell) for cell in found["cells"]),
            "",
        ]
    return "\n".join(lines)


def _row(cell: dict[str, Any]) -> str:
    timed = {entry["name"]: entry for entry in cell["latencies"]}
    dense, half = timed["dense"], timed["half"]
    ratio = half["ratio"]
    trusted = "" if cell["self_check"]["result"] == "passed" else " (untrusted)"
    return (
        f"| {cell['model']} | {cell['batch']} | {cell.get('sequence') or ''} | {dense['p50_ms']:.2f} | "
        f"{half['p50_ms']:.2f} | {ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] | "
        f"{half['verdict']}{trusted} |"
    )


if __name__ == "__main__":
    main()
