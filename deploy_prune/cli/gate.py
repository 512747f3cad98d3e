"""`deploy-prune gate`: may this bundle ship?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from deploy_prune.release.gate import GateReport
    from deploy_prune.release.rules import Rules

FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(short_help="Hold a bundle's figures against release rules; exit code for CI.")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--rules", "file", type=FILE, help="YAML file of rule sets; flags add one more set.")
@click.option("--member", "members", multiple=True, metavar="NAME", help="Name or pattern.  [default: all but dense]")
@click.option("--runtime", help="Hold latency rules in this runtime's cells only.")
@click.option("--batch", type=int, help="... at this batch size only.")
@click.option(
    "--seq", "sequence", type=int, help="... at this sequence length only; without --past, of graphs without a cache."
)
@click.option("--past", type=int, help="... of decoding on a cache of so many tokens only; 0: of prompts to a decoder.")
@click.option("--bound", type=click.Choice(["point", "interval"]), help="Judge figures, or their interval's worse end.")
@click.option(
    "--max-drop", metavar="LIMIT", help="Loss of quality: 1% of dense's figure, or 0.01 in the metric's unit."
)
@click.option("--max-p50-ms", type=float, help="Median latency.")
@click.option("--max-p90-ms", type=float, help="90th percentile of latency.")
@click.option("--max-p99-ms", type=float, help="99th percentile of latency.")
@click.option("--min-speedup", type=float, help="Dense's median latency over the member's, in the same run.")
@click.option("--max-bytes", metavar="LIMIT", help="Of the ONNX file: 20MB, or 50% of dense.")
@click.option("--max-macs", metavar="LIMIT", help="Of one example: 1.2G, or 50% of dense.")
@click.option("--max-params", metavar="LIMIT", help="Parameters: 10M, or 50% of dense.")
@click.option("--max-parity", type=float, help="Difference from torch, relative to the largest output.")
@click.option("--require-audit", "audit", is_flag=True, default=None, help="The graph's audit was made and passed.")
@click.option("--require-runtime", multiple=True, metavar="NAME", help="Members must have been timed in it.")
@click.option("--require-license", "license", is_flag=True, default=None, help="Weights' and data's must be known.")
@click.option("--key", "signature", type=FILE, help="Public key the bundle must be signed with.")
@click.option("--allow-unmeasured", multiple=True, metavar="RULE", help="A rule that a missing figure does not break.")
@click.option("--no-verify", is_flag=True, help="Trust the files: skip hashes, graphs and stored answers.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdicts as JSON.")
@click.option("--junit", type=FILE, help="Write JUnit XML.")
@click.option("--markdown", type=FILE, help="Write Markdown; a GitHub job's summary gets it in any case.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of rules files.")
def command(
    bundle: Path | None,
    file: Path | None,
    as_json: bool,
    junit: Path | None,
    markdown: Path | None,
    schema: bool,
    no_verify: bool,
    **flags: Any,
) -> None:
    """Judge BUNDLE by rules from a file, flags, or both. Every rule gives a verdict for every member it holds for.

    A figure that nobody measured breaks its rule, unless allowed. The bundle is verified first.

    Exit code 0: every rule holds; 1: some do not; 2: the rules are wrong; 3: no such bundle; 4: the bundle is damaged.
    """
    from deploy_prune.cli import console
    from deploy_prune.release import gate_output, rules

    if schema:
        console.emit_json(rules.schema())
        return
    if bundle is None:
        raise click.UsageError("Missing BUNDLE.")
    from deploy_prune.release.gate import gate

    report = gate(bundle, _rules(file, flags, no_verify), progress=console.progress())
    if junit is not None:
        gate_output.write(junit, gate_output.junit(report))
    if markdown is not None:
        gate_output.write(markdown, gate_output.markdown(report))
    gate_output.append_job_summary(report)
    if as_json:
        console.emit_json(report.to_json())
    else:
        console.table(
            ["member", "rule", "figure", "limit", "verdict"],
            [[v.member, v.name, v.figure, v.limit, v.outcome] for v in report.verdicts],
            title=f"{report.bundle}: {'may ship' if report.passed else 'must not ship'}",
        )
    _raise_for(report)


def _rules(file: Path | None, flags: dict[str, Any], no_verify: bool) -> Rules:
    """The file's rule sets and the one that the flags make."""
    from deploy_prune.release.rules import Rules, load_rules, rules_from

    given = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in flags.items()
        if value not in (None, ())
    }
    if "signature" in given:
        given["signature"] = str(given["signature"])
    sets = list(load_rules(file).rules) if file is not None else []
    if given or file is None:
        sets += rules_from({"rules": [given]}, where="the command line").rules
    if no_verify:
        sets = [rule_set.model_copy(update={"verify": False}) for rule_set in sets]
    return Rules(rules=sets)


def _raise_for(report: GateReport) -> None:
    """Leave with the exit code of the worst that was found."""
    from deploy_prune.errors import GateError
    from deploy_prune.release.gate_output import sentence

    if report.error is not None:
        raise report.error
    if not report.passed:
        raise GateError(
            f"{len(report.failures)} of {len(report.verdicts)} rules broken",
            where=report.bundle,
            problems=[
                sentence(verdict) + (f" ({verdict.reason.splitlines()[0]})" if verdict.reason else "")
                for verdict in report.failures
            ],
        )
