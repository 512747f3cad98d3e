"""Text classification: rows are padded on the right, grouped by length, and judged in one fixed order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deploy_prune.data import Examples
from deploy_prune.errors import DataError, UnsupportedModelError, UsageError
from deploy_prune.tasks import Task, load_task

Save = Callable[[nn.Module], Path]


def sentences(count: int = 12, classes: int = 2) -> Examples:
    texts = [" ".join(f"w{(7 * i + j) % 95}" for j in range(1 + (5 * i) % 9)) for i in range(count)]
    return Examples("made", {"text": texts, "label": [i % classes for i in range(count)]})


def task_of(model: nn.Module, folder: Path, data: Examples, **options: Any) -> Task:
    return load_task(
        "text-classification", model=model, model_ref=f"hf:{folder}", calibration=data, evaluation=data, **options
    )


def test_rows_are_padded_on_the_right_under_a_mask(saved: Save, tiny_distilbert: nn.Module) -> None:
    task = task_of(tiny_distilbert, saved(tiny_distilbert), sentences())
    for batch in task.calibration(4):
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert ids.dtype == mask.dtype == torch.int64
        assert (mask.sort(dim=1, descending=True).values == mask).all()
        assert (ids[mask == 0] == 0).all() and (ids[:, 0] == 2).all()
        assert mask.sum(1).max() == mask.shape[1]


def test_padding_does_not_change_the_loss_of_a_row(saved: Save, tiny_distilbert: nn.Module) -> None:
    task = task_of(tiny_distilbert, saved(tiny_distilbert), sentences())

    def losses(batch_size: int) -> torch.Tensor:
        batches = task.evaluation(batch_size)
        return torch.cat([task.loss(task.signature.call(tiny_distilbert, b.inputs), b) for b in batches])

    torch.testing.assert_close(losses(1), losses(12), rtol=1e-4, atol=1e-5)


def test_calibration_is_one_shuffled_pass_per_seed(saved: Save, tiny_distilbert: nn.Module) -> None:
    task = task_of(tiny_distilbert, saved(tiny_distilbert), sentences())

    def ids(seed: int) -> list[list[int]]:
        rows = [row for batch in task.calibration(4, seed=seed) for row in batch.inputs["input_ids"].tolist()]
        return [[token for token in row if token] for row in rows]

    assert ids(0) == ids(0) != ids(1)
    assert sorted(ids(0)) == sorted(ids(1))
    assert len(ids(0)) == task.calibration_size == 12


def test_accuracy_of_the_models_own_answers_is_one(saved: Save, tiny_bert: nn.Module) -> None:
    folder, data = saved(tiny_bert), sentences(classes=3)
    probe = task_of(tiny_bert, folder, data)
    answers = probe.reference_answers(lambda inputs: probe.signature.call(tiny_bert, inputs), batch_size=12)
    lengths = [len(text.split()) for text in data.column("text")]
    order = sorted(range(12), key=lengths.__getitem__)
    labels = [int(answers[order.index(i)]) for i in range(12)]
    task = task_of(tiny_bert, folder, Examples("own", {"text": list(data.column("text")), "label": labels}))
    assert task.evaluate(lambda inputs: task.signature.call(tiny_bert, inputs), batch_size=5).value == 1.0


@pytest.mark.parametrize("metric", ["matthews", "f1"])
def test_metrics_of_all_answers_together_are_one_where_all_are_right(
    saved: Save, tiny_distilbert: nn.Module, metric: str
) -> None:
    folder, data = saved(tiny_distilbert), sentences(classes=2)
    probe = task_of(tiny_distilbert, folder, data)

    def predict(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        centred: torch.Tensor = probe.signature.call(tiny_distilbert, inputs) - middle
        return centred

    outputs = torch.cat([probe.signature.call(tiny_distilbert, batch.inputs) for batch in probe.evaluation(1)])
    middle = outputs.detach().median(0).values  # both classes are answered
    answers = probe.reference_answers(predict, batch_size=12)
    lengths = [len(text.split()) for text in data.column("text")]
    order = sorted(range(12), key=lengths.__getitem__)
    labels = [int(answers[order.index(i)]) for i in range(12)]
    own = Examples("own", {"text": list(data.column("text")), "label": labels})
    task = task_of(tiny_distilbert, folder, own, metric=metric)
    quality = task.evaluate(predict, batch_size=5)
    assert quality.value == 1.0
    assert quality.per_example.shape == (12, 2)
    wrong = Examples("wrong", {"text": list(data.column("text")), "label": [1 - label for label in labels]})
    assert task_of(tiny_distilbert, folder, wrong, metric=metric).evaluate(predict).value <= 0.0


def test_f1_of_three_classes_is_refused(saved: Save, tiny_bert: nn.Module) -> None:
    with pytest.raises(UsageError, match="two classes"):
        task_of(tiny_bert, saved(tiny_bert), sentences(classes=3), metric="f1")


def test_one_text_needs_no_segments_and_a_pair_does(saved: Save, tiny_bert: nn.Module) -> None:
    folder = saved(tiny_bert)
    single = task_of(tiny_bert, folder, sentences())
    assert [spec.name for spec in single.signature.inputs] == ["input_ids", "attention_mask"]
    data = Examples("pairs", {"text": ["w1 w2"], "text2": ["w3"], "label": [2]})
    pair = task_of(tiny_bert, folder, data)
    (batch,) = pair.evaluation(1)
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]
    assert pair.signature.call(tiny_bert, batch.inputs).shape == (1, 3)


def test_pairs_and_single_texts_do_not_mix(saved: Save, tiny_bert: nn.Module) -> None:
    pairs = Examples("pairs", {"text": ["w1"], "text2": ["w3"], "label": [2]})
    with pytest.raises(DataError, match="pairs"):
        load_task(
            "text-classification",
            model=tiny_bert,
            model_ref=f"hf:{saved(tiny_bert)}",
            calibration=pairs,
            evaluation=sentences(),
        )


def test_rows_are_cut_at_the_least_limit(saved: Save, tiny_distilbert: nn.Module) -> None:
    long = Examples("long", {"text": ["w1 " * 100], "label": [0]})
    folder = saved(tiny_distilbert)
    widths = [
        next(task_of(tiny_distilbert, folder, long, **options).evaluation(1)).inputs["input_ids"].shape[1]
        for options in ({}, {"max_length": 9})
    ]
    assert widths == [40, 9]
    with pytest.raises(UsageError, match="max_length"):
        task_of(tiny_distilbert, folder, long, max_length=1)


def test_label_names_are_those_of_the_config_or_refused(saved: Save, tiny_distilbert: Any) -> None:
    tiny_distilbert.config.label2id = {"bad": 0, "good": 1}
    folder = saved(tiny_distilbert)
    named = Examples("named", {"text": ["w1", "w2"], "label": ["good", "bad"]})
    (batch,) = task_of(tiny_distilbert, folder, named).evaluation(2)
    assert batch.target is not None and batch.target.tolist() == [1, 0]
    with pytest.raises(DataError, match="meh"):
        task_of(tiny_distilbert, folder, Examples("odd", {"text": ["w1"], "label": ["meh"]}))


def test_data_without_text_or_labels_is_refused(saved: Save, tiny_distilbert: nn.Module) -> None:
    folder = saved(tiny_distilbert)
    with pytest.raises(DataError, match="text=COLUMN"):
        task_of(tiny_distilbert, folder, Examples("x", {"sentence": ["w1"], "label": [0]}))
    with pytest.raises(DataError, match="unlabeled"):
        task_of(tiny_distilbert, folder, Examples("x", {"text": ["w1"]}))
    task = task_of(tiny_distilbert, folder, Examples("x", {"text": ["w1"]}), metric="agreement")
    assert next(task.calibration(1)).target is None


def test_model_that_does_not_classify_is_refused(saved: Save, tiny_llama: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match="SequenceClassification"):
        task_of(tiny_llama, saved(tiny_llama), sentences())


@pytest.mark.slow
def test_distilbert_reaches_its_known_accuracy_on_real_sentences(data_dir: Path) -> None:
    from deploy_prune.sources import load_model

    ref, data = f"hf:{data_dir}/models/distilbert_sst2", f"tsv:{data_dir}/glue/SST-2/dev.tsv?text=sentence"
    model = load_model(ref)
    task = load_task("text-classification", model=model, model_ref=ref, calibration=data, evaluation=data)
    quality = task.evaluate(lambda inputs: task.signature.call(model, inputs))
    assert round(quality.value, 4) == 0.8968
