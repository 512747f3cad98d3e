"""`inspect` tells what it is given by its scheme first, then by its suffix."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy_prune.cli.inspect import _describer, describe_bundle, describe_model, describe_path, describe_plan
from deploy_prune.errors import UsageError


def test_a_model_reference_is_a_model_whatever_its_file_is_called(tmp_path: Path) -> None:
    assert _describer("timm:vit_tiny_patch16_224@weights.safetensors") is describe_model
    assert _describer("path.safetensors") is describe_path
    assert _describer("plans/s30.json") is describe_plan
    assert _describer(str(tmp_path)) is describe_bundle
    with pytest.raises(UsageError, match="cannot tell"):
        _describer("model.onnx")
