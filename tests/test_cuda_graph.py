"""Sessions that replay graphs: on a CPU nothing is recorded, but binding, sizes and outputs are the same code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx_models import save_mlp

from bench.runtimes.cuda_graph import GraphSession, _Replayed
from bench.runtimes.ort import create
from bench.runtimes.ort_cpu import PROVIDER, OrtCpu, session_options
from deploy_prune.errors import UnavailableError


def made(folder: Path) -> GraphSession:
    file = save_mlp(folder / "dense.onnx")
    return GraphSession(file, create(file, [(PROVIDER, {})], session_options(1)), device="cpu", facts={})


def test_every_binding_has_its_own_inputs_and_outputs(tmp_path: Path) -> None:
    session = made(tmp_path)
    generator = np.random.default_rng(0)
    given = [{"x": generator.standard_normal((rows, 4)).astype(np.float32)} for rows in (2, 5)]
    bounds = [session.bind(inputs) for inputs in given]
    for inputs, bound in zip(given, bounds, strict=True):
        expected = OrtCpu().load(tmp_path / "dense.onnx").run(inputs)[0]
        bound()
        np.testing.assert_allclose(bound.outputs()[0], expected, rtol=1e-6)
        np.testing.assert_allclose(session.run(inputs)[0], expected, rtol=1e-6)


def test_a_replay_that_computes_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = _Replayed.__call__, []

    def records_alone(self: _Replayed) -> None:
        calls.append(1)
        if len(calls) == 1:
            real(self)

    monkeypatch.setattr(_Replayed, "__call__", records_alone)
    with pytest.raises(UnavailableError, match="replayed CUDA graph does not compute"):
        made(tmp_path).bind({"x": np.ones((2, 4), np.float32)})
