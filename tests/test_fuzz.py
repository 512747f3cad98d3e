"""Damaged and forged files: readers take them or refuse them in our words (10,000 more: `bench.studies.fuzz`)."""

from __future__ import annotations

import json

import pytest
from figures import changed, judged
from forms import random_path, signature_of
from shipped import bundle_of

from bench.studies.fuzz import fuzz, readers, seeds, yaml_bomb
from deploy_prune.errors import ArtifactError, RecipeError
from deploy_prune.files import read_json
from deploy_prune.recipe import load_recipe
from deploy_prune.release.rules import load_rules


@pytest.fixture
def bundle(tiny_vit, tmp_path):
    bundle = bundle_of(tiny_vit, tmp_path)
    random_path(tiny_vit, signature_of("tiny_vit")).save(bundle / "path.safetensors")
    return changed(bundle, s02=judged(bundle, "s02", [1.0, 0.0, 1.0]))


def test_every_reader_only_ever_refuses_in_our_words(bundle, tmp_path):
    good = seeds(bundle, tmp_path)
    assert set(good) == set(readers())
    for name, tally in fuzz(good, count=800).items():
        assert not tally.escapes, name
        assert tally.refused > 50, name


def test_a_small_file_that_stands_for_billions_of_values_is_refused(tmp_path):
    (tmp_path / "bomb.yaml").write_bytes(yaml_bomb())
    for read in (load_recipe, load_rules):
        with pytest.raises(RecipeError, match="aliases"):
            read(tmp_path / "bomb.yaml")
    (tmp_path / "loop.yaml").write_text("model: &a [*a]\n")
    with pytest.raises(RecipeError, match="aliases"):
        load_recipe(tmp_path / "loop.yaml")


def test_aliases_of_a_usual_size_are_read(tmp_path):
    (tmp_path / "gate.yaml").write_text(
        "rules:\n  - &first {max_bytes: 10}\n  - {members: &names [s30], max_bytes: 10}\n"
        "  - {members: *names, max_macs: 1}\n"
    )
    assert load_rules(tmp_path / "gate.yaml").rules[2].members == ["s30"]


@pytest.mark.parametrize("depth", [101, 5000, 1_000_000])
def test_deep_nesting_is_refused(tmp_path, depth):
    (tmp_path / "deep.json").write_text("[" * depth + "]" * depth)
    with pytest.raises(ArtifactError, match="not valid JSON"):
        read_json(tmp_path / "deep.json")


def test_nesting_that_we_write_is_read(tmp_path):
    data: list = []
    for _ in range(90):
        data = [data]
    (tmp_path / "deep.json").write_text(json.dumps(data))
    assert read_json(tmp_path / "deep.json") == data
