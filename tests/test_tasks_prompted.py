"""A prompted classifier answers with the logit of each answer's first token, after the last token of the prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deploy_prune as dp
from deploy_prune.data import Examples
from deploy_prune.errors import DataError, UnsupportedModelError, UsageError
from deploy_prune.tasks import Task, load_task

Save = Callable[[nn.Module], Path]
ASKED: dict[str, Any] = {"template": "w1 {text} w2", "answers": [" w10", " w20", " w30"]}


def sentences(count: int = 9) -> Examples:
    texts = [" ".join(f"w{3 + (7 * i + j) % 80}" for j in range(1 + (5 * i) % 7)) for i in range(count)]
    return Examples("made", {"text": texts, "label": [i % 3 for i in range(count)]})


def task_of(model: nn.Module, folder: Path, data: Examples | None = None, **options: Any) -> Task:
    data = data or sentences()
    return load_task(
        "prompted-classification",
        model=model,
        model_ref=f"hf:{folder}",
        calibration=data,
        evaluation=data,
        **{**ASKED, **options},
    )


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_opt", "tiny_gpt2"])
def test_logits_are_those_of_the_answers_after_each_unpadded_prompt(
    saved: Save, family: str, request: pytest.FixtureRequest
) -> None:
    model: nn.Module = request.getfixturevalue(family)
    task = task_of(model, saved(model))
    for batch in task.evaluation(4):
        found = task.signature.call(model, batch.inputs)
        for row, (ids, mask) in enumerate(zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True)):
            alone = model(input_ids=ids[: int(mask.sum())][None]).logits[0, -1]
            torch.testing.assert_close(found[row], alone[[14, 24, 34]], rtol=1e-4, atol=1e-5)  # w0 is token 4


def test_the_model_is_left_as_it_was(saved: Save, tiny_llama: nn.Module) -> None:
    task = task_of(tiny_llama, saved(tiny_llama))
    batch = next(iter(task.evaluation(4)))
    before = tiny_llama(**batch.inputs).logits
    task.signature.call(tiny_llama, batch.inputs)
    assert torch.equal(tiny_llama(**batch.inputs).logits, before)


def test_a_decoder_is_pruned_for_its_answers_and_shipped_as_their_logits(
    saved: Save, tiny_llama: nn.Module, tmp_path: Path
) -> None:
    task = task_of(tiny_llama, saved(tiny_llama))
    path = dp.search(tiny_llama, task, method="layer-adaptive", batch_size=4)
    plan = path.plan(sparsity=0.4)
    moments = dp.collect_moments(tiny_llama, path.sites, task.calibration(4), task.signature, losses=task.loss)
    small = dp.compact(dp.refit(tiny_llama, plan, moments, basis=path.basis), plan, check_weights=False)
    dp.export_onnx(small, tmp_path / "small.onnx", task.signature)
    dp.check_parity({"compact": small, "onnx": tmp_path / "small.onnx"}, task.signature)


def test_answers_that_begin_alike_are_refused(saved: Save, tiny_llama: nn.Module) -> None:
    with pytest.raises(UsageError, match="same token"):
        task_of(tiny_llama, saved(tiny_llama), answers=[" w10 w11", " w20", " w10 w12"])


def test_answers_of_no_token_are_refused(saved: Save, tiny_llama: nn.Module) -> None:
    with pytest.raises(UsageError, match="token of its own"):
        task_of(tiny_llama, saved(tiny_llama), answers=["", " w10", " w20"])


@pytest.mark.parametrize("template", ["no field", "{text} {other}", "{text", "{0}", None])
def test_a_template_that_does_not_read_the_text_is_refused(
    saved: Save, tiny_llama: nn.Module, template: str | None
) -> None:
    with pytest.raises(UsageError, match=r"template|prompt"):
        task_of(tiny_llama, saved(tiny_llama), template=template)


def test_a_prompt_is_refused_rather_than_cut_short(saved: Save, tiny_llama: nn.Module) -> None:
    task = task_of(tiny_llama, saved(tiny_llama), max_length=6)
    with pytest.raises(DataError, match="too long"):
        list(task.evaluation(4))


def test_a_model_with_a_classifier_is_refused(saved: Save, tiny_distilbert: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match="text-classification"):
        task_of(tiny_distilbert, saved(tiny_distilbert))


def test_labels_may_be_the_answers_themselves(saved: Save, tiny_llama: nn.Module) -> None:
    data = Examples("made", {"text": ["w5", "w6"], "label": ["w30", "w10"]})
    (batch,) = task_of(tiny_llama, saved(tiny_llama), data).evaluation(4)
    assert batch.target is not None and sorted(batch.target.tolist()) == [0, 2]
