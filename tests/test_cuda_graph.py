"""Sessions that replay graphs: on a CPU nothing is recorded, but binding, sizes and outputs are the same code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx_models import save_mlp

from bench.runtimes.cuda_graph import GraphSession
from bench.runtimes.ort import create
from bench.runtimes.ort_cpu import PROVIDER, OrtCpu, session_options


def test_every_binding_has_its_own_inputs_and_outputs(tmp_path: Path) -> None:
    file = save_mlp(tmp_path / "dense.onnx")
    session = GraphSession(file, create(file, [(PROVIDER, {})], session_options(1)), device="cpu", facts={})
    generator = np.random.default_rng(0)
    given = [{"x": generator.standard_normal((rows, 4)).astype(np.float32)} for rows in (2, 5)]
    bounds = [session.bind(inputs) for inputs in given]
    for inputs, bound in zip(given, bounds, strict=True):
        expected = OrtCpu().load(file).run(inputs)[0]
        bound()
        np.testing.assert_allclose(bound.outputs()[0], expected, rtol=1e-6)
        np.testing.assert_allclose(session.run(inputs)[0], expected, rtol=1e-6)
