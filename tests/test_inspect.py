"""`inspect` tells what it is given by its scheme first, then by its suffix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from forms import FAMILIES, random_path, signature_of

from converters.surgery import compact
from deploy_prune.adapters import find_sites
from deploy_prune.architecture import weights_sha256
from deploy_prune.budget import count_params
from deploy_prune.cli.inspect import _describer, command, describe_bundle, describe_model, describe_path, describe_plan
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


def test_a_paths_layers_are_told_at_the_asked_sparsities_and_drawn(tiny_vit, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = random_path(tiny_vit, signature_of("tiny_vit"))
    file, picture = tmp_path / "path.safetensors", tmp_path / "layers.png"
    path.save(file)
    found = CliRunner().invoke(command, [str(file), "--at", ".3,.5", "--plot", str(picture), "--json"])
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)["layers"]
    assert [row["site"] for row in rows] == [site.name for site in path.sites]
    counts = path.plan(0.5).counts(path.sites)
    assert rows[1]["at"][1]["kept"] == {kind.value: n for kind, n in counts[rows[1]["site"]].items()}
    prunable = [path.costs.prunable([site]) for site in path.sites]
    gone = sum(row["at"][0]["gone"] * size for row, size in zip(rows, prunable, strict=True)) / sum(prunable)
    assert gone == pytest.approx(path.plan(0.3).achieved.sparsity)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "kept at 0.3" in CliRunner().invoke(command, [str(file), "--at", ".3"]).stdout


def test_only_a_path_has_layers_at_a_sparsity() -> None:
    found = CliRunner().invoke(command, ["digits", "--at", ".3"])
    assert isinstance(found.exception, UsageError) and "layers of a path" in str(found.exception)
