"""A plan that does not fit is refused before a weight is touched, with every problem listed."""

from __future__ import annotations

import json

import pytest
from forms import random_path, signature_of

from converters.surgery import compact
from deploy_prune.adapters import find_sites
from deploy_prune.architecture import weights_sha256
from deploy_prune.errors import ArtifactError, PlanError, UnavailableError
from deploy_prune.plan import PrunePlan


@pytest.fixture
def llama_plan(tiny_llama):
    return random_path(tiny_llama, signature_of("tiny_llama")).plan(0.3)


def edited(plan, **sites):
    data = plan.to_json()
    for name, entry in sites.items():
        data["keep"][name.replace("__", ".")] = {**(WHOLE if "attn" in name and entry else {}), **entry}
    return PrunePlan.from_json(data)


# two key/value heads with 4 rotary pairs and 8 value dimensions each
WHOLE = {"head": [0, 1, 2, 3], "qk": list(range(8)), "vo": list(range(16))}
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


@pytest.mark.parametrize(
    ("site", "entry", "message"),
    [
        ("model.layers.9.mlp", {"neuron": [0]}, "no such site"),
        (ATTENTION, {"head": [0]}, "keeps query heads 0 but key/value group 0 owns heads 0-1"),
        (ATTENTION, {"head": [0, 1, 2]}, "group 1 owns heads 2-3; keep the whole group or none of it"),
        (ATTENTION, {"head": []}, "keeps qk units of the removed heads 0,1"),
        (ATTENTION, {"head": [], "qk": []}, "keeps no head and no qk but others; a site that vanishes keeps nothing"),
        (ATTENTION, {"vo": []}, "keeps no vo but others"),
        (ATTENTION, {"vo": [0, 1, 8]}, "keeps unequally many vo in its heads: 2,1"),
        (ATTENTION, {"head": [0, 1]}, "keeps qk units of the removed heads 1"),
        (ATTENTION, {"qk": [0, 4, 8]}, "keeps qk units 8, the site has 8 (0-7)"),
        (ATTENTION, {"head": [0, 1, 4, 5]}, "keeps query heads 4,5, the site has 4 (0-3)"),
        (ATTENTION, {"head": [1, 0]}, "rising order"),
        (ATTENTION, {"neuron": [0, 1]}, "has no neuron units (it has head, qk, vo)"),
        (ATTENTION, {}, "says nothing of its head units"),
        (MLP, {"neuron": [0, 0, 1]}, "once each"),
        (MLP, {"neuron": [-1, 3]}, "keeps neurons -1, the site has 48"),
        (MLP, {"neuron": list(range(60))}, "(12 in all), the site has 48"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(tiny_llama, llama_plan, site, entry, message):
    bad = edited(llama_plan, **{site: entry})
    before = weights_sha256(tiny_llama)
    with pytest.raises(PlanError) as caught:
        compact(tiny_llama, bad, inplace=True)
    assert message in str(caught.value)
    assert site in str(caught.value)
    assert weights_sha256(tiny_llama) == before, "no weight was touched"


def test_a_fractional_head_is_not_a_plan(llama_plan):
    with pytest.raises(ArtifactError, match="valid integer"):
        edited(llama_plan, **{ATTENTION: {"head": [0, 0.5]}})


def test_all_problems_are_listed_at_once(tiny_llama, llama_plan):
    bad = edited(llama_plan, **{ATTENTION: {"head": [0]}, MLP: {"neuron": [99]}, "elsewhere": {"neuron": [0]}})
    with pytest.raises(PlanError) as caught:
        bad.validate_for(find_sites(tiny_llama), "0" * 64)
    assert len(caught.value.problems) == 6, "the broken group also leaves the dimensions of another head"
    assert "Search again" in str(caught.value)


def test_a_missing_site_is_a_problem(tiny_llama, llama_plan):
    data = llama_plan.to_json()
    del data["keep"][MLP]
    with pytest.raises(PlanError, match="list every site"):
        PrunePlan.from_json(data).validate_for(find_sites(tiny_llama))


def test_a_plan_for_other_weights_is_refused(tiny_llama, llama_plan):
    tiny_llama.model.norm.weight.data[0] += 1
    with pytest.raises(PlanError, match="the plan was made for sha256"):
        compact(tiny_llama, llama_plan)


def test_a_plan_survives_a_round_trip_byte_for_byte(tmp_path, llama_plan):
    llama_plan.save(tmp_path / "a.json")
    again = PrunePlan.load(tmp_path / "a.json")
    assert again == llama_plan
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_version": 1}, "unknown plan version"),
        ({"_type": "Recipe"}, "not a plan"),
        ({"surprise": 1}, "Extra inputs"),
        ({"weights_sha256": "abc"}, "weights_sha256"),
    ],
)
def test_a_file_that_is_not_this_version_of_a_plan_is_refused(tmp_path, llama_plan, change, message):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({**llama_plan.to_json(), **change}))
    with pytest.raises(ArtifactError, match=message):
        PrunePlan.load(file)


def test_a_truncated_plan_file_is_refused(tmp_path, llama_plan):
    file = tmp_path / "plan.json"
    llama_plan.save(file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match="not valid JSON"):
        PrunePlan.load(file)


def test_a_missing_plan_file_says_so(tmp_path):
    with pytest.raises(UnavailableError, match="no such file"):
        PrunePlan.load(tmp_path / "none.json")
