"""Recipes: strict, with every mistake in one message; overrides and environment; the built-in ones are valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy_prune.errors import RecipeError, UnavailableError, UsageError
from deploy_prune.recipe import Recipe, builtin_recipes, find_recipe, load_recipe, recipe_from, schema

MINIMAL: dict[str, Any] = {
    "model": "timm:vit_tiny_patch16_224@w.safetensors",
    "task": {"name": "image-classification", "calibration": "imagefolder:train"},
    "family": {"sparsities": [0.5, 0.3]},
}


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(data: Any) -> Path:
        path = tmp_path / "small.yaml"
        path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
        return path

    return write


def problems_of(path: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert str(path) in str(caught.value)
    return caught.value.problems


def test_a_minimal_recipe_is_named_after_its_file_and_orders_members_from_large_to_small(written: Any) -> None:
    recipe = load_recipe(written(MINIMAL))
    assert recipe.name == "small"
    assert recipe.family.values == [0.3, 0.5]
    assert recipe.family.member_names() == ["s30", "s50"]


def test_members_of_a_measured_budget_are_named_by_it_aligned_and_largest_first() -> None:
    for budget, targets, names in (("latency", [0.8, 2.5], ["2p5ms", "0p8ms"]), ("speedup", [2, 1.5], ["1p5x", "2x"])):
        family = recipe_from({**MINIMAL, "name": "x", "family": {"budget": budget, "targets": targets}}).family
        assert family.member_names() == names and family.alignment == 8
    assert recipe_from({**MINIMAL, "name": "x", "family": {"sparsities": [0.3]}}).family.alignment == 1


def test_members_of_other_budgets_are_ordered_and_named_by_their_target() -> None:
    recipe = recipe_from({**MINIMAL, "name": "x", "family": {"budget": "macs", "targets": [0.25, 4e8, 0.125]}})
    assert recipe.family.values == [4e8, 0.25, 0.125]
    assert recipe.family.member_names() == ["macs400000000", "macs25", "macs12p5"]


def test_all_mistakes_are_reported_at_once_with_place_expected_and_got(written: Any) -> None:
    bad = {
        **MINIMAL,
        "serach": {"method": "spp"},
        "family": {"sparsities": [0.3, 1.5]},
        "refit": {"ridg": 1.0, "examples": 0},
        "seed": "one",
    }
    text = "\n".join(problems_of(written(bad)))
    assert "serach: unknown key. Did you mean 'search'?" in text
    assert "refit.ridg: unknown key. Did you mean 'ridge'?" in text
    assert "family.sparsities[1]: expected less than 1; got 1.5" in text
    assert "refit.examples: expected greater than or equal to 1; got 0" in text
    assert "seed: expected a valid integer" in text and "got 'one'" in text


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, 1.5, ".nan", ".inf", "half"])
def test_sparsity_outside_the_open_unit_interval_is_refused(written: Any, sparsity: Any) -> None:
    problems = problems_of(written(MINIMAL), f"family.sparsities=[{sparsity}]")
    assert problems[0].startswith("family.sparsities[0]: expected")


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ({}, "either `sparsities` or `budget` with `targets`"),
        ({"sparsities": []}, "at least one member"),
        ({"sparsities": [0.3, 0.3]}, "every member once"),
        ({"sparsities": [0.3, 0.3000000001]}, "two members would be called s30"),
        ({"sparsities": [0.3], "budget": "macs"}, "use `targets`"),
        ({"targets": [2.0]}, "between 0 and 1, both excluded, got 2.0"),
        ({"targets": [-1.0], "budget": "macs"}, "greater than 0"),
        ({"targets": [0.5], "budget": "speedup"}, "speed-ups above 1, got 0.5"),
        ({"sparsities": [0.3], "kinds": ["heads"]}, "'head'"),
    ],
)
def test_a_family_that_makes_no_sense_is_refused(written: Any, family: dict[str, Any], words: str) -> None:
    assert words in "\n".join(problems_of(written({**MINIMAL, "family": family})))


def test_nodes_to_keep_without_a_precision_are_refused(written: Any) -> None:
    (problem,) = problems_of(written({**MINIMAL, "precision": {"keep": ["node"]}}))
    assert "`keep` without `also`" in problem


@pytest.mark.parametrize(
    "settings",
    [["precision.keep_decoder=[a]", "precision.also=[fp16]"], ["bench.past=[8]"], ["export.last_logits=true"]],
)
def test_what_concerns_decoders_with_a_cache_wants_them(settings: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"export\.cache: true"):
        load_recipe("digits", settings)
    load_recipe("digits", [*settings, "export.cache=true"])


def test_a_seed_that_no_generator_takes_is_refused(written: Any) -> None:
    assert problems_of(written(MINIMAL), f"seed={2**64}")[0].startswith("seed: expected less than")


def test_overrides_are_yaml_reach_nested_keys_and_come_before_validation(written: Any) -> None:
    recipe = load_recipe(
        written(MINIMAL), ["family.sparsities=[0.2, 0.4]", "search.options.steps=40", "refit.ridge=1e-2", "seed=7"]
    )
    assert recipe.family.values == [0.2, 0.4]
    assert recipe.search.options == {"steps": 40}
    assert (recipe.refit.ridge, recipe.seed) == (0.01, 7)


def test_malformed_overrides_are_all_reported(written: Any) -> None:
    problems = problems_of(written(MINIMAL), "seed", "model.name=x", "seed=[1", "task.nam=x")
    assert len(problems) == 4
    assert "expected KEY=VALUE" in problems[0] and "not a group of keys" in problems[1]
    assert "not valid YAML" in problems[2] and "Did you mean 'name'?" in problems[3]


def test_environment_variables_are_expanded(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPLOY_PRUNE_DATA", "/data")
    recipe = load_recipe(written({**MINIMAL, "model": "timm:x@${DEPLOY_PRUNE_DATA}/w.safetensors"}))
    assert recipe.model == "timm:x@/data/w.safetensors"


def test_an_unset_variable_is_named_with_the_key_that_replaces_it(
    written: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DEPLOY_PRUNE_DATA", raising=False)
    path = written({**MINIMAL, "model": "timm:x@${DEPLOY_PRUNE_DATA}/w.safetensors"})
    with pytest.raises(UnavailableError, match="DEPLOY_PRUNE_DATA") as caught:
        load_recipe(path)
    assert "--set model=VALUE" in str(caught.value) and caught.value.exit_code == 3
    assert load_recipe(path, ["model=timm:x@w.safetensors"]).model == "timm:x@w.safetensors"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "not valid YAML"),
        ("- a\n- b\n", "expected: a mapping"),
        ("", "got: NoneType"),
        ("model: a\nmodel: b\n", "'model' is given twice"),
        ("name: 2024-13-45\n", "not valid YAML"),
        ("model: !!python/object/apply:os.system [echo]\n", "not valid YAML"),
    ],
)
def test_text_that_is_not_a_recipe_is_refused(written: Any, text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=r"small\.yaml") as caught:
        load_recipe(written(text))
    assert words in str(caught.value)


def test_recipes_are_found_by_file_or_by_built_in_name(tmp_path: Path) -> None:
    assert find_recipe("digits") == builtin_recipes()["digits"]
    with pytest.raises(UsageError, match="Did you mean 'digits'"):
        find_recipe("digit")
    with pytest.raises(UnavailableError, match="no such recipe file"):
        find_recipe(tmp_path / "missing.yaml")
    with pytest.raises(UsageError, match="a directory is not a recipe"):
        find_recipe(tmp_path)


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_every_built_in_recipe_is_valid_and_says_what_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPLOY_PRUNE_DATA", "/data")
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


def test_equal_recipes_have_equal_canonical_text_and_survive_a_round_trip(written: Any) -> None:
    recipe = load_recipe(written(MINIMAL))
    assert Recipe.model_validate(json.loads(recipe.canonical())).canonical() == recipe.canonical()
    assert load_recipe(written(MINIMAL), ["seed=1"]).canonical() != recipe.canonical()


def test_the_schema_names_every_part_and_forbids_more() -> None:
    described = schema()
    assert set(described["properties"]) == set(Recipe.model_fields)
    assert described["additionalProperties"] is False


def test_every_key_is_described_in_the_schema() -> None:
    whole = schema()
    parts = {"Recipe": whole, **whole["$defs"]}
    bare = [
        f"{part}.{key}" for part, d in parts.items() for key, v in d["properties"].items() if "description" not in v
    ]
    assert bare == []
