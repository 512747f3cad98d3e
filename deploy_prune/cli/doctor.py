"""`deploy-prune doctor`: what is here, what is missing, and how to get it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import click

from deploy_prune.errors import UnavailableError


@click.command("doctor")
@click.option(
    "--require",
    "required",
    multiple=True,
    metavar="RUNTIME",
    help="Leave with exit code 3 unless this runtime works here. May be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON on stdout.")
def command(required: tuple[str, ...], as_json: bool) -> None:
    """Show devices, runtimes and versions, and how to get what is missing."""
    from bench.runtimes import find_runtime
    from deploy_prune.cli import console

    for name in required:
        find_runtime(name)  # an unknown name is wrong usage, whatever is installed
    findings = examine()
    if as_json:
        console.emit_json(findings)
    else:
        _show(findings)
    missing = [name for name in required if not findings["runtimes"][name]["available"]]
    if missing:
        raise UnavailableError(
            "a required runtime is not available here",
            problems=[f"{name}: {findings['runtimes'][name]['reason']}" for name in missing],
            remedy=" ".join(dict.fromkeys(findings["runtimes"][name]["remedy"] for name in missing)),
        )


def examine() -> dict[str, Any]:
    """Everything the command reports, as JSON. Names of people, hosts and directories are left out."""
    from bench.environment import environment, memory_bytes, package_versions
    from bench.runtimes import RUNTIMES

    runtimes = {}
    for name, runtime in RUNTIMES.items():
        reason = runtime.available()
        runtimes[name] = {"available": reason is None, "reason": reason, "remedy": runtime.remedy if reason else None}
    memory = memory_bytes()
    data = os.environ.get("DEPLOY_PRUNE_DATA")
    return {
        "_type": "doctor",
        "_version": 1,
        **environment(),
        "packages": package_versions(),
        "runtimes": runtimes,
        "memory": {"total_gib": _gib(memory[0]), "available_gib": _gib(memory[1])} if memory else None,
        "disk_free_gib": {"here": _free(Path.cwd()), "temporary": _free(Path(os.environ.get("TMPDIR", "/tmp")))},
        "data": {
            "DEPLOY_PRUNE_DATA": "set, but no directory"
            if data and not Path(data).is_dir()
            else "set"
            if data
            else "not set"
        },
    }


def _show(findings: dict[str, Any]) -> None:
    from deploy_prune.cli import console

    cpu, memory, disk = findings["cpu"], findings["memory"], findings["disk_free_gib"]
    quota = f", quota {cpu['quota']:g}" if cpu["quota"] else ""
    load = findings["load_average"]
    gpus = [f"{gpu['name']}, driver {gpu['driver']}, {gpu['memory_mib']} MiB" for gpu in findings["gpus"]]
    console.facts(
        {
            "cpu": f"{cpu['model']}, {cpu['physical']} cores ({cpu['logical']} threads{quota}); "
            f"models get {cpu['usable']} threads",
            "load": " ".join(f"{value:.2f}" for value in load) if load else "unknown",
            "gpu": "; ".join(gpus) or "none (no NVIDIA driver answers)",
            "memory": f"{memory['available_gib']} GiB free of {memory['total_gib']} GiB" if memory else "unknown",
            "disk": ", ".join(
                f"{'?' if free is None else free} GiB free {where}"
                for where, free in (("here", disk["here"]), ("for temporary files", disk["temporary"]))
            ),
            "system": f"{findings['os']}, Python {findings['python']}",
            "data": f"DEPLOY_PRUNE_DATA is {findings['data']['DEPLOY_PRUNE_DATA']}",
        },
        title="Machine",
    )
    print()
    packages = {name: version or "not installed" for name, version in findings["packages"].items()}
    console.facts(packages, title="Packages")
    print()
    rows = [
        [name, "available" if found["available"] else "missing", found["reason"] or ""]
        for name, found in findings["runtimes"].items()
    ]
    console.table(["runtime", "state", "why"], rows)
    for name, found in findings["runtimes"].items():
        if not found["available"]:
            print(f"To get {name}: {found['remedy']}")


def _gib(size: int) -> float:
    return round(size / 2**30, 1)


def _free(directory: Path) -> float | None:
    try:
        return _gib(shutil.disk_usage(directory).free)
    except OSError:
        return None
