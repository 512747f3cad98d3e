"""`deploy-prune compare`: is the new bundle worse than the old one?"""

from __future__ import annotations

from pathlib import Path

import click

BUNDLE = click.Path(path_type=Path)


@click.command(short_help="Compare two bundles: regression, improvement or noise.")
@click.argument("old", type=BUNDLE)
@click.argument("new", type=BUNDLE)
@click.option("--max-regression", default="0%", metavar="LIMIT", show_default=True, help="How much worse may be: 3%.")
@click.option("--allow-incomparable", is_flag=True, help="Figures measured otherwise (another device) do not fail.")
@click.option("--json", "as_json", is_flag=True, help="Print every finding as JSON.")
def command(old: Path, new: Path, max_regression: str, allow_incomparable: bool, as_json: bool) -> None:
    """Compare the figures of NEW with those of OLD, members matched by name: quality, latency relative to the dense
    model of the same run, bytes, MACs, parameters.

    A change is a regression or an improvement only when its 95 % interval excludes none. A regression of more than
    --max-regression fails, and so does a member or figure that NEW lacks or that cannot be compared.

    Exit code 0: nothing fails; 1: something does; 3: no such bundle; 4: a bundle is damaged.
    """
    from deploy_prune.cli import console
    from deploy_prune.errors import GateError, UsageError
    from deploy_prune.release.limits import parse_limit
    from deploy_prune.release.versions import compare_bundles

    try:
        limit = parse_limit(max_regression)
    except ValueError as error:
        raise UsageError("--max-regression is no limit", got=str(error)) from error
    found = compare_bundles(old, new, max_regression=limit.value, allow_incomparable=allow_incomparable)
    if as_json:
        console.emit_json(found.to_json())
    else:
        console.table(
            ["member", "figure", "old", "new", "worse by", "95 % interval", "verdict"],
            [
                [
                    f.member,
                    f.figure,
                    f.old,
                    f.new,
                    "" if f.change is None else f"{f.change:+.2%}",
                    "" if f.interval is None else f"[{f.interval[0]:+.2%}, {f.interval[1]:+.2%}]",
                    f.kind + (" (fails)" if f.fails else ""),
                ]
                for f in found.findings
            ],
            title=f"{found.old} -> {found.new}",
        )
    failing = [f for f in found.findings if f.fails]
    if failing:
        raise GateError(
            f"{len(failing)} of {len(found.findings)} figures fail",
            where=str(new),
            expected=f"no regression of more than {max_regression}",
            problems=[
                f"{f.member}: {f.figure} {f.kind}: {f.old} -> {f.new or 'nothing'}"
                + (f" ({f.reason})" if f.reason else "")
                for f in failing
            ],
        )
