"""A dry run finds every wrong name and missing file before anything is loaded, downloaded or written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deploy_prune.cli.main import run_command
from deploy_prune.errors import UnavailableError, UsageError
from deploy_prune.pipeline.dry import dry_run
from deploy_prune.pipeline.run import run_recipe
from deploy_prune.pipeline.setup import check_names, data_identity
from deploy_prune.recipe import Recipe, builtin_recipes, load_recipe, recipe_from

NEEDS_HUB = ("deit-small-imagenet", "llama2-7b")
LOCAL = sorted(set(builtin_recipes()) - set(NEEDS_HUB) - {"digits", "digits-recover"})


def recipe(**changes: Any) -> Recipe:
    return recipe_from(
        {
            "name": "small",
            "model": "python:deploy_prune.demo:digits_vit",
            "task": {"name": "image-classification", "calibration": "digits:train", "evaluation": "digits:test"},
            "family": {"sparsities": [0.3]},
            **changes,
        }
    )


def test_unknown_names_and_options_are_all_reported_with_the_nearest_known_one() -> None:
    wrong = recipe(
        task={"name": "image-classificaton", "calibration": "digits:train"},
        search={"method": "sp"},
        bench={"runtimes": ["ort-cpu", "ort-gpu"]},
    )
    with pytest.raises(UsageError) as caught:
        check_names(wrong)
    text = "\n".join(caught.value.problems)
    assert "task.name: unknown task 'image-classificaton'. Did you mean 'image-classification'?" in text
    assert "search.method: unknown method 'sp'. Did you mean 'spp'?" in text
    assert "bench.runtimes[1]: unknown runtime 'ort-gpu'." in text


def test_unknown_options_of_task_and_method_are_reported() -> None:
    wrong = recipe(
        task={"name": "image-classification", "calibration": "digits:train", "options": {"imagesize": 8}},
        search={"method": "spp", "options": {"step": 3}},
    )
    with pytest.raises(UsageError) as caught:
        check_names(wrong)
    text = "\n".join(caught.value.problems)
    assert "task.options.imagesize: unknown option. Did you mean 'image_size'?" in text
    assert "search.options.step: unknown key. Did you mean 'steps'?" in text


def test_options_of_another_method_come_with_the_way_out() -> None:
    with pytest.raises(UsageError, match=r"--set search\.options=\{\}") as caught:
        check_names(load_recipe("digits", ["search.options={steps: 20}", "search.method=magnitude"]))
    assert caught.value.problems == ("search.options.steps: unknown key. (it takes none)",)
    check_names(load_recipe("digits", ["search.method=magnitude", "search.options={}"]))


def test_the_demo_can_run_and_says_that_it_runs_python_code(tmp_path: Path) -> None:
    outlook = dry_run(load_recipe("digits"), tmp_path / "out")
    assert outlook.missing == [] and outlook.fetch == []
    assert "runs its own Python code" in outlook.text()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", NEEDS_HUB)
def test_a_recipe_of_the_hub_says_what_it_would_fetch(name: str, tmp_path: Path) -> None:
    outlook = dry_run(load_recipe(name, ["bench.runtimes=[ort-cpu]"]), tmp_path / "out")
    outlook.raise_for_missing()
    assert [line.split()[0] for line in outlook.fetch] == ["model", "calibration", "evaluation"]
    assert all("hub:" in line for line in outlook.fetch)


def test_a_timm_model_of_the_hub_shows_its_sites_without_a_download(tmp_path: Path) -> None:
    outlook = dry_run(load_recipe("deit-small-imagenet"), tmp_path / "out")
    assert any("72 units of kind head" in line for line in outlook.sites)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOCAL)
def test_a_recipe_on_local_files_shows_its_sites_and_misses_nothing(name: str, data_dir: Path, tmp_path: Path) -> None:
    outlook = dry_run(load_recipe(name), tmp_path / "out")
    assert outlook.missing == [] and outlook.fetch == []
    assert any("units of kind neuron" in line for line in outlook.sites)


@pytest.mark.parametrize("name", LOCAL)
def test_missing_files_are_all_named_with_exit_3(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEPLOY_PRUNE_DATA", str(tmp_path / "data"))
    assert run_command(["run", name, "--dry-run"]) == 3
    printed = capsys.readouterr()
    assert f"calibration data {tmp_path}" in printed.err and f"evaluation data {tmp_path}" in printed.err
    assert "members: dense, s" in printed.out


def test_the_outlook_as_json_holds_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", "digits", "--dry-run", "--json", "--set", "family.sparsities=[0.25]"]) == 0
    outlook = json.loads(capsys.readouterr().out)
    assert outlook["members"] == ["s25"]
    assert outlook["stages"][-1].startswith("bundle")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run"], 2, "Missing RECIPE"),
        (["run", "digit"], 2, "Did you mean 'digits'"),
        (["run", "no/such.yaml"], 3, "no such recipe file"),
        (
            ["run", "digits", "--set", "family.sparsities=[1.2]"],
            2,
            "family.sparsities[0]: expected less than 1; got 1.2",
        ),
        (["run", "digits", "--set", "model=tim:x", "--dry-run"], 2, "Did you mean 'timm'"),
        (
            ["run", "digits", "--set", "model=timm:vit_tiny_patch16_244", "--dry-run"],
            2,
            "Did you mean 'vit_tiny_patch16",
        ),
        (["run", "digits", "--set", "task.calibration=digts", "--dry-run"], 2, "Did you mean 'digits'"),
        (["run", "digits", "--set", "device=cuda", "--dry-run"], 3, "no CUDA device"),
        (["search", "timm:x", "--task", "t"], 2, "Missing option '--data'"),
        (["export", "missing.safetensors", "--sparsity", ".3", "-o", "out"], 3, "no such path file"),
        (["inspect", "nothing"], 2, "cannot tell what 'nothing' is"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_input_has_its_exit_code_and_a_remedy(
    arguments: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert run_command(arguments) == code
    assert words in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Recipe"


def test_data_that_changed_has_another_identity(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text("text\tlabel\na\t1\n")
    before = data_identity(f"tsv:{file}")
    file.write_text("text\tlabel\na\t1\nb\t0\n")
    assert data_identity(f"tsv:{file}") != before


def test_a_runtime_that_is_not_here_stops_a_run_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.runtimes.ort_cuda.OrtCuda.available", lambda self: "no GPU answers")
    out = tmp_path / "out"
    with pytest.raises(UnavailableError, match="no GPU answers"):
        run_recipe(recipe(model="python:no_such_module:f", bench={"runtimes": ["ort-cpu", "ort-cuda"]}), out)
    assert not list(tmp_path.iterdir())


def test_a_taken_output_stops_a_run_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import deploy_prune.pipeline.run as run

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    monkeypatch.setattr(run, "prepare", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError, match="the output is taken"):
        run_recipe(load_recipe("digits"), tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_sequence_lengths_for_a_model_without_a_sequence_stop_a_run_before_the_search(tmp_path: Path) -> None:
    overrides = ["model=python:deploy_prune.demo:digits_vit_untrained", "bench.seq=[5]"]
    with pytest.raises(UsageError, match="no sequence to vary"):
        run_recipe(load_recipe("digits", overrides), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_opset_nobody_tried_is_refused() -> None:
    with pytest.raises(UsageError, match="opset"):
        load_recipe("digits", ["export.opset=99"])


def test_a_run_of_a_plan_without_the_plan_stops_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="plan build"):
        run_recipe(load_recipe("digits", ["search.method=plan", "search.options={}"]), tmp_path / "out")
    assert not list(tmp_path.iterdir())
