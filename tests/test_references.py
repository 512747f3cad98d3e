"""References are parsed whole or refused with the nearest right spelling; packages are located, not imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deploy_prune.errors import UnavailableError, UsageError
from deploy_prune.references import data_reference, existing_path, local_path, model_reference


def test_timm_reference_splits_into_name_file_options_and_hash() -> None:
    digest = "ab" * 32
    reference = model_reference(f"timm:vit@dir/w.safetensors?num_classes=10&depths=[2,4]&mode=x%26y#sha256={digest}")
    assert (reference.location, reference.file, reference.sha256) == ("vit", "dir/w.safetensors", digest)
    assert reference.arguments == {"num_classes": 10, "depths": [2, 4], "mode": "x&y"}


def test_python_reference_keeps_its_colon() -> None:
    assert model_reference("python:package.module:function").location == "package.module:function"


@pytest.mark.parametrize("text", ["tim:x", "vit_tiny", "hf:", "timm:vit@", "hf:x#sha256=12", "hf:x?a=1&a=2", "hf:x?a"])
def test_malformed_model_reference_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        model_reference(text)


def test_unknown_scheme_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'timm'"):
        model_reference("tim:vit")
    with pytest.raises(UsageError, match="Did you mean 'imagefolder'"):
        data_reference("imagefoldr:x")


def test_package_location_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "explosive_package_for_test"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    found = existing_path("package:explosive_package_for_test/model/config.json")
    assert found == package / "model" / "config.json"
    assert "explosive_package_for_test" not in sys.modules


def test_absent_package_says_what_to_install() -> None:
    with pytest.raises(UnavailableError, match="pip install --no-deps no-such-package"):
        local_path("package:no_such_package/model")


def test_dotted_package_is_refused_because_finding_it_would_import_its_parent() -> None:
    with pytest.raises(UsageError, match="top-level"):
        local_path("package:os.path/x")
