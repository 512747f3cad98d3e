"""`inspect` tells what it is given by its scheme first, then by its suffix."""

from __future__ import annotations

from pathlib import Path

import pytest
from forms import FAMILIES

from converters.surgery import compact
from deploy_prune.adapters import find_sites
from deploy_prune.architecture import weights_sha256
from deploy_prune.budget import count_params
from deploy_prune.cli.inspect import _describer, describe_bundle, describe_model, describe_path, describe_plan
from deploy_prune.errors import UsageError
from deploy_prune.inspection import offers
from deploy_prune.plan import plan_from_units
from deploy_prune.units import groups


def test_a_model_reference_is_a_model_whatever_its_file_is_called(tmp_path: Path) -> None:
    assert _describer("timm:vit_tiny_patch16_224@weights.safetensors") is describe_model
    assert _describer("path.safetensors") is describe_path
    assert _describer("plans/s30.json") is describe_plan
    assert _describer(str(tmp_path)) is describe_bundle
    with pytest.raises(UsageError, match="cannot tell"):
        _describer("model.onnx")


@pytest.fixture(params=FAMILIES)
def model(request):
    return request.getfixturevalue(request.param)


def test_what_a_model_offers_accounts_for_every_parameter(model) -> None:
    found = offers(model)
    sites = {row["site"]: row["params"] for row in found["units"] if row["kind"] in ("head", "neuron")}
    biases = sum(p.numel() for s in find_sites(model) if (p := model.get_submodule(s.out).bias) is not None)
    assert sum(sites.values()) + biases + sum(row["params"] for row in found["stays"]) == count_params(model)
    assert found["MACs"] > sum(row["MACs"] for row in found["units"] if row["kind"] in ("head", "neuron")) > 0


def test_a_units_cost_is_what_a_model_without_it_saves(model) -> None:
    rows = {(row["site"], row["kind"]): row["params per unit"] for row in offers(model)["units"]}
    sites = find_sites(model)
    for site, kind in [groups(sites)[0], groups(sites)[-1]]:
        kept = {(s.name, k): range(s.units(k)) for s, k in groups(sites)}
        kept[site.name, kind] = kept[site.name, kind][1:]
        for other in set(site.counts) - {kind}:  # the units of qk and vo that lie in the removed head
            per = site.counts[other]
            kept[site.name, other] = range(per, site.units(other))
        small = compact(model, plan_from_units("tiny", weights_sha256(model), sites, kept))
        assert count_params(model) - count_params(small) == rows[site.name, kind.value]
