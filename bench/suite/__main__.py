"""Run every check of the GPU suite and write one JSON file for each: bench/gpu_suite.sh calls this.

python -m bench.suite --out bench/results            on the first GPU, in about seven minutes
python -m bench.suite --small --out DIR              small models on the CPU, to test the suite itself
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
import traceback
from contextlib import closing
from pathlib import Path
from typing import Any

import click

LIMIT = 600.0
RESERVE = 20.0  # a check is not begun with less left


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Results go to OUT/DEVICE/CHECK.json.")
@click.option("--small", is_flag=True, help="Small models on the CPU.")
@click.option("--check", "names", multiple=True, help="Only these.  [default: all]")
@click.option(
    "--limit", type=float, default=LIMIT, show_default=True, help="Seconds; checks that do not fit are not begun."
)
def main(out: Path, small: bool, names: tuple[str, ...], limit: float) -> None:
    from bench.environment import cpu_model, environment, gpu_name
    from bench.suite.checks import AHEAD, CHECKS, TIMED, Bench
    from bench.suite.jobs import Jobs
    from deploy_prune.errors import DeployPruneError, UnavailableError, UsageError, did_you_mean
    from deploy_prune.files import read_json, write_json

    for name in names:
        if name not in CHECKS:
            raise UsageError(f"no check {name!r}", remedy=did_you_mean(name, list(CHECKS)))
    if not small and gpu_name() is None:
        raise UnavailableError(
            "no NVIDIA GPU answers here", where="bench.suite", remedy="--small runs the suite on the CPU, to test it."
        )
    place = slug(cpu_model() + " small" if small else gpu_name() or "gpu")
    began, here = time.monotonic(), environment()
    summary: dict[str, Any] = {"device": place, "small": small, "environment": here, "checks": {}}
    if names and (out / place / "summary.json").is_file():  # some checks again: the others' results stay
        summary["checks"] = read_json(out / place / "summary.json")["checks"]
    with (
        tempfile.TemporaryDirectory(prefix="deploy-prune-") as scratch,
        closing(Jobs(began + limit)) as jobs,  # ended whatever happens, before their directory goes
    ):
        runtime = "ort-cpu" if small else "ort-cuda"
        bench = Bench(small, "cpu" if small else "cuda", runtime, Path(scratch), 0.05 if small else 0.3, jobs)
        for name in names or CHECKS:
            if name in AHEAD:
                AHEAD[name](bench)
        for name in names or CHECKS:
            if name in TIMED:
                jobs.settle()
            waited, beside = jobs.waited, jobs.running()
            spent = time.monotonic() - began
            if limit - spent < RESERVE:
                summary["checks"][name] = {
                    "state": "not begun",
                    "why": f"{spent:.0f} of {limit:.0f} seconds were spent",
                }
                click.echo(f"{name}: not begun, out of time")
                continue
            state, found, at = "passed", bench.begin(), environment()
            try:
                found = CHECKS[name](bench)
            except DeployPruneError as error:
                state, found = "failed", {**bench.found, "error": str(error)}
            except Exception as error:
                state, found = (
                    "failed",
                    {**bench.found, "error": repr(error), "trace": traceback.format_exc().splitlines()[-6:]},
                )
            seconds = round(time.monotonic() - began - spent, 1)
            write_json(
                _made(out / place) / f"{name}.json",
                {"check": name, "state": state, "seconds": seconds, "jobs_beside": beside, "environment": at, **found},
            )
            summary["checks"][name] = {
                "state": state,
                "seconds": seconds,
                "waited": round(jobs.waited - waited, 1),  # for the CPU's part, of these seconds
            }
            click.echo(f"{name}: {state} in {seconds:.1f} s" + (f": {found['error']}" if state == "failed" else ""))
    summary["seconds"] = round(sum(check.get("seconds", 0) for check in summary["checks"].values()), 1)
    write_json(_made(out / place) / "summary.json", summary)
    sys.exit(0 if all(check["state"] == "passed" for check in summary["checks"].values()) else 1)


def slug(name: str) -> str:
    """`NVIDIA H100 PCIe` -> `nvidia-h100-pcie`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


if __name__ == "__main__":
    from deploy_prune.errors import DeployPruneError as Failure

    try:
        main(standalone_mode=False)
    except Failure as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
