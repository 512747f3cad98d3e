"""Licence and origin are what recipe or files say, never a guess; the Hub reads the card, and the gate can insist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shipped import bundle_of

from deploy_prune.cli.main import run_command
from deploy_prune.provenance import HUB_LICENSES, Origin, data_origin, model_origin
from deploy_prune.release.card import model_card
from deploy_prune.release.gate import gate
from deploy_prune.release.manifest import Manifest, OriginEntry, ProvenanceEntry
from deploy_prune.release.rules import Rules, RuleSet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_what_no_file_says_is_unknown(folder: Path) -> None:
    assert model_origin(f"hf:{folder}") == Origin()
    assert model_origin("python:some.module:function") == Origin()
    assert data_origin("tsv:none.tsv") == Origin()
    (folder / "README.md").write_text("---\nlicense: unknown\n---\n")
    assert model_origin(f"hf:{folder}").license is None


def test_a_card_goes_before_the_configuration_and_the_recipe_before_both(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"license": "mit"}))
    assert model_origin(f"hf:{folder}") == Origin("mit", None, "config.json")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: ours\nbase_model: [a/b]\n---\nText.\n")
    assert model_origin(f"hf:{folder}") == Origin("ours", "a/b", "the card of mine")
    assert model_origin(f"hf:{folder}", "mit") == Origin("mit", "a/b", "the recipe and the card of mine")
    assert data_origin(f"imagefolder:{folder}") == Origin("ours", "a/b", "the card of mine")


@pytest.mark.parametrize("text", ["", "---\n- [\n---\n", "---\n3\n---\n", "---\nlicense: {a: 1}\n---\n", "\x00"])
def test_a_card_that_says_nothing_readable_is_passed_over(folder: Path, text: str) -> None:
    (folder / "README.md").write_text(text)
    assert model_origin(f"hf:{folder}") == Origin()


def test_weights_files_say_it_in_their_metadata(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    file = tmp_path / "w.safetensors"
    save_file({"a": np.zeros(1, np.float32)}, file, {"license": "apache-2.0", "source": "trained here"})
    reference = f"timm:vit_tiny_patch16_224@{file}"
    assert model_origin(reference) == Origin("apache-2.0", "trained here", "the metadata of w.safetensors")


def test_timm_speaks_for_the_weights_it_fetches_and_for_no_file_beside(tmp_path: Path) -> None:
    assert model_origin("timm:vit_tiny_patch16_224").license == "apache-2.0"
    assert model_origin(f"timm:vit_tiny_patch16_224@{tmp_path / 'none.safetensors'}") == Origin()


def test_a_gguf_file_says_it_in_its_metadata(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.add_source_url("https://example.org/m")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = model_origin(f"gguf:{tmp_path / 'm.gguf'}")
    assert found == Origin("apache-2.0", "https://example.org/m", "the GGUF file's metadata")


@pytest.mark.parametrize(
    ("stated", "head"),
    [
        (None, {"license": "unknown"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("Our own: terms", {"license": "other", "license_name": "Our own: terms"}),
    ],
)
def test_card_states_licences_in_words_and_as_the_hub_reads_them(tiny_vit, tmp_path, stated, head) -> None:
    from huggingface_hub import ModelCard

    manifest = Manifest.load(bundle_of(tiny_vit, tmp_path) / "manifest.json")
    provenance = ProvenanceEntry(model=OriginEntry(license=stated, stated_by="the recipe" if stated else None))
    card = ModelCard(model_card(manifest.model_copy(update={"provenance": provenance})), ignore_metadata_errors=False)
    said = card.data.to_dict()
    assert {key: value for key, value in said.items() if key.startswith("license")} == head
    assert said["license"] in HUB_LICENSES
    assert f"| dense model | {stated or 'unknown'} | unknown |" in card.text
    assert ("not known" in card.text) == (stated is None)


def test_gate_can_require_that_licences_are_known(tiny_vit, tmp_path, capsys) -> None:
    bundle = bundle_of(tiny_vit, tmp_path)

    def verdicts(**rules):
        report = gate(bundle, Rules(rules=[RuleSet(verify=False, license=True, **rules)]))
        return {verdict.cell: verdict.outcome for verdict in report.verdicts}

    assert verdicts() == {"weights": "not measured", "data": "not measured"}
    assert verdicts(allow_unmeasured=["license"]) == {"weights": "allowed", "data": "allowed"}
    assert run_command(["gate", str(bundle), "--require-license", "--no-verify"]) == 1
    assert "unknown" in capsys.readouterr().out
    manifest = Manifest.load(bundle / "manifest.json")
    known = ProvenanceEntry(model=OriginEntry(license="mit"), data=OriginEntry(license="cc0-1.0"))
    manifest.model_copy(update={"provenance": known}).save(bundle / "manifest.json")
    assert verdicts() == {"weights": "passed", "data": "passed"}
