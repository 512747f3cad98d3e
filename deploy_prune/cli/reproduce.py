"""`deploy-prune reproduce`: does the recipe of a bundle give this bundle again?"""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Run a bundle's recipe again and compare what comes out.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Where the new bundle goes.  [default: BUNDLE-again]")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def command(bundle: Path, out: Path | None, as_json: bool) -> None:
    """Run the recipe in BUNDLE's manifest again, without its timing, and compare path, plans and graphs byte by byte,
    quality figure by figure. It needs what the run needed: model, data, environment variables.

    Exit code 0: everything is the same; 1: something is not. Other versions of torch or onnx may be the reason; they
    are listed.
    """
    from deploy_prune.cli import console
    from deploy_prune.errors import GateError
    from deploy_prune.release.reproduce import reproduce

    out = out or bundle.resolve().with_name(bundle.resolve().name + "-again")
    found = reproduce(bundle, out, progress=console.progress(), note=console.note)
    if as_json:
        console.emit_json(found.to_json())
    else:
        console.table(["part", "then", "now", ""], [[p.name, p.old, p.new, p.kind] for p in found.parts])
    if not found.same:
        raise GateError(
            f"{sum(part.kind != 'same' for part in found.parts)} of {len(found.parts)} parts are not the same",
            where=found.out,
            problems=found.versions,
            remedy="The same bytes are promised for the same inputs, versions and kind of processor.",
        )
    console.note(f"the same: {len(found.parts)} parts; {found.out}")
