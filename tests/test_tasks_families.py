"""Every supported text family goes through the tasks: a row's answer does not depend on its neighbours' lengths."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import randomize
from shipped import run_onnx
from tiny_text import ENCODER, LLAMA, SPECIAL

from converters.onnx_export import export_onnx
from deploy_prune.data import Examples
from deploy_prune.errors import UnsupportedModelError
from deploy_prune.sources import load_model
from deploy_prune.tasks import load_task
from deploy_prune.tasks.tokens import max_length_of

TEXTS = [" ".join(f"w{(7 * i + j) % 95}" for j in range(1 + (5 * i) % 9)) for i in range(6)]
DECODER = {**LLAMA, **SPECIAL, "num_labels": 3}
GPT2 = {"vocab_size": 99, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, **SPECIAL, "num_labels": 3}
OPT = {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32}


def made(prefix, kind, settings):
    import transformers

    config = getattr(transformers, f"{prefix}Config")(attn_implementation="sdpa", **settings)
    return randomize(getattr(transformers, f"{prefix}{kind}")(config))


def task_of(name, folder, model, data, **options):
    return load_task(name, model=model, model_ref=f"hf:{folder}", calibration=data, evaluation=data, **options)


def outputs(task, model, batch_size):
    """By row of ids without padding, what the model says."""
    found = {}
    for batch in task.evaluation(batch_size):
        with torch.no_grad():
            output = task.signature.call(model, batch.inputs)
        lengths = batch.inputs["attention_mask"].sum(1).tolist()
        for ids, length, row in zip(batch.inputs["input_ids"].tolist(), lengths, output, strict=True):
            found[tuple(ids[:length])] = row
    return found


def assert_padding_has_no_say(task, model, file):
    alone, together = outputs(task, model, 2 if task.name == "sentence-embedding" else 1), outputs(task, model, 6)
    assert alone.keys() == together.keys() and len(alone) == 6
    for ids, row in alone.items():
        torch.testing.assert_close(together[ids], row, rtol=1e-4, atol=1e-5)
    export_onnx(model, file, task.signature)
    batch = next(task.evaluation(6))
    with torch.no_grad():
        expected = task.signature.call(model, batch.inputs)
    torch.testing.assert_close(run_onnx(file, batch.inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("prefix", "settings"),
    [
        ("Roberta", ENCODER),
        ("Albert", {**ENCODER, "embedding_size": 16}),
        ("Llama", DECODER),
        ("GPT2", GPT2),
        ("OPT", OPT),
    ],
)
def test_classifiers_of_every_outline_are_accepted(prefix, settings, saved, tmp_path):
    model = made(prefix, "ForSequenceClassification", settings)
    task = task_of(
        "text-classification", saved(model), model, Examples("made", {"text": TEXTS, "label": [0, 1, 2, 0, 1, 2]})
    )
    assert_padding_has_no_say(task, model, tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("prefix", "settings", "pooling"),
    [("Electra", {**ENCODER, "embedding_size": 16}, "cls"), ("Llama", DECODER, "lasttoken"), ("GPT2", GPT2, "mean")],
)
def test_embedders_of_every_outline_are_accepted(prefix, settings, pooling, saved, tmp_path):
    model = made(prefix, "Model", settings)
    data = Examples("made", {"text": TEXTS[::2], "text2": TEXTS[1::2], "score": [0.0, 2.0, 5.0]})
    task = task_of("sentence-embedding", saved(model), model, data, pooling=pooling)
    assert_padding_has_no_say(task, model, tmp_path / "m.onnx")


def test_model_with_a_head_is_no_embedder(saved, tiny_bert):
    with pytest.raises(UnsupportedModelError, match="without a head"):
        task_of("sentence-embedding", saved(tiny_bert), tiny_bert, Examples("made", {"text": TEXTS}), pooling="cls")


def test_classifier_without_padding_token_is_refused_and_the_remedy_works(saved):
    model = made("GPT2", "ForSequenceClassification", {**GPT2, "pad_token_id": None})
    folder = saved(model)
    data = Examples("made", {"text": TEXTS, "label": [0, 1, 2, 0, 1, 2]})
    with pytest.raises(UnsupportedModelError, match=r"pad_token_id=0"):
        task_of("text-classification", folder, model, data)
    again = load_model(f"hf:{folder}?pad_token_id=0")
    assert task_of("text-classification", folder, again, data).evaluation_size == 6


def test_positions_after_the_padding_id_leave_room_for_fewer_tokens(tiny_roberta, tiny_bert):
    tokenizer = SimpleNamespace(model_max_length=10**30)
    assert max_length_of(tiny_roberta, tokenizer, None) == 64  # 66 positions, of which ids 0 and 1 (padding) are none
    assert max_length_of(tiny_bert, tokenizer, None) == 64
    with torch.no_grad():
        tiny_roberta(torch.full((1, 64), 7))
        with pytest.raises((IndexError, RuntimeError)):
            tiny_roberta(torch.full((1, 65), 7))
