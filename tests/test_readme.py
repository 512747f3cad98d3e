"""The Python of the README does what the README says, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import pytest
from torch import nn

README = Path(__file__).parents[1] / "README.md"


def test_first_example_gives_a_smaller_model_that_loads_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, *_ = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    again, dense = (cast(nn.Module, names[name]) for name in ("again", "model"))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (again, dense)]
    assert sizes[0] < 0.8 * sizes[1]
    assert (tmp_path / "small.onnx").stat().st_size > 4 * sizes[0]
