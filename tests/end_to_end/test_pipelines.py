"""The pipeline examples do what they say: their own shell steps, executed as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from digits import SETTINGS

from deploy_prune.release.manifest import Manifest

ROOT = Path(__file__).parents[2]
UNTIMED = {**SETTINGS, "bench.enabled": "false"}


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a runner on which deploy-prune is installed."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "deploy-prune").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m deploy_prune -q "$@"\n')
    (tools / "deploy-prune").chmod(0o755)
    (tmp_path / "good.yaml").write_text("rules:\n  - {max_bytes: 90%, max_parity: 1e-4}\n")
    (tmp_path / "bad.yaml").write_text("rules:\n  - {max_bytes: 1kB}\n")
    return {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def shell(script: str, where: Path, environment: dict[str, str]) -> int:
    return subprocess.run(["bash", "-eo", "pipefail", "-c", script], cwd=where, env=environment, check=False).returncode


def steps(inputs: dict[str, str]) -> dict[str, tuple[str, dict[str, str]]]:
    """Name -> (script, environment) of the action's shell steps, expressions replaced as GitHub does."""
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    values = {name: str(entry.get("default", "")) for name, entry in action["inputs"].items()} | inputs
    required = {name for name, entry in action["inputs"].items() if entry.get("required")}
    assert required <= set(inputs)

    def filled(text: str) -> str:
        return re.sub(r"\$\{\{ inputs\.([a-z-]+) \}\}", lambda found: values[found[1]], text)

    found: dict[str, tuple[str, dict[str, str]]] = {}
    for step in action["runs"]["steps"]:
        if "run" in step:
            assert step["shell"] == "bash" and "${{" not in step["run"]  # inputs are no part of a script
            found[step["name"]] = (step["run"], {k: filled(v) for k, v in step.get("env", {}).items()})
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_github_action_runs_a_recipe_gates_it_and_leaves_its_report(tmp_path: Path, machine: dict[str, str]) -> None:
    summary = tmp_path / "summary.md"
    machine["GITHUB_STEP_SUMMARY"] = str(summary)
    settings = "\n".join(f"{key}={value}" for key, value in UNTIMED.items())
    made = steps({"recipe": "digits", "rules": "good.yaml", "settings": settings})
    assert list(made) == ["Install", "Run", "Gate", "Report"]
    for name in ("Run", "Gate", "Report"):
        script, own = made[name]
        assert shell(script, tmp_path, {**machine, **own}) == 0, name
    assert [m.name for m in Manifest.load(tmp_path / "runs/bundle/manifest.json").members] == ["dense", "s50"]
    for file in ("report.html", "gate.xml", "gate.md", "tradeoff.png"):
        assert (tmp_path / "runs/results" / file).stat().st_size > 100
    assert "may ship" in summary.read_text()

    script, own = steps({"recipe": "digits", "rules": "bad.yaml"})["Gate"]
    assert shell(script, tmp_path, {**machine, **own}) == 1
    assert "<failure" in (tmp_path / "runs/results/gate.xml").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gitlab_job_runs_a_recipe_file_gates_it_and_leaves_its_report(tmp_path: Path, machine: dict[str, str]) -> None:
    pipeline: dict[str, Any] = yaml.safe_load((ROOT / "examples/gitlab-ci.yml").read_text())
    job = pipeline["prune"]
    recipe = yaml.safe_load((ROOT / "recipes/digits.yaml").read_text())
    for key, value in UNTIMED.items():
        part, _, name = key.rpartition(".")
        (recipe.setdefault(part, {}) if part else recipe)[name] = yaml.safe_load(value)
    (tmp_path / "prune.yaml").write_text(yaml.safe_dump(recipe))
    variables = {**pipeline["variables"], "RULES": "good.yaml"}
    for line in [*job["script"], *job["after_script"]]:
        assert shell(line, tmp_path, {**machine, **variables}) == 0, line
    assert (tmp_path / "runs/results/report.html").exists()
    assert job["artifacts"]["reports"]["junit"].startswith("runs/")


def test_example_workflow_gives_the_action_only_inputs_that_it_has() -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    workflow = yaml.safe_load((ROOT / "examples/github.yml").read_text())
    (step,) = [step for step in workflow["jobs"]["prune"]["steps"] if "deploy-prune" in step["uses"]]
    assert set(step["with"]) <= set(action["inputs"])
