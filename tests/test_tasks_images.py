"""Image classification: images arrive as the model was trained on them, once, in a repeatable order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from deploy_prune.data import Examples, Lazy, load_data
from deploy_prune.errors import DataError, GateError, UsageError
from deploy_prune.tasks import Task, load_task
from deploy_prune.tasks.images import PreparedImages, preparation


def noise(count: int = 10, size: int = 40, classes: int = 5) -> Examples:
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]
    return Examples("noise", {"image": images, "label": [i % classes for i in range(count)]})


def task_of(model: nn.Module, data: Examples, **options: Any) -> Task:
    return load_task(
        "image-classification", model=model, model_ref="made", calibration=data, evaluation=data, **options
    )


def test_pixels_equal_those_of_timms_own_transform(tiny_vit: nn.Module) -> None:
    from timm.data import create_transform, resolve_data_config

    data = noise()
    config = resolve_data_config({"input_size": (3, 32, 32)}, model=tiny_vit)
    expected = create_transform(**config)(data[3]["image"])
    batch = list(task_of(tiny_vit, data).evaluation(2))[1]
    assert torch.equal(batch.inputs["pixel_values"][1], expected)


def test_size_is_that_of_the_built_model_not_of_its_pretraining(tiny_vit: nn.Module) -> None:
    assert preparation(tiny_vit).size == (3, 32, 32)


def test_options_go_before_the_models_own_configuration(tiny_vit: nn.Module) -> None:
    made = preparation(tiny_vit, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear", crop_pct=1.0)
    assert (made.mean, made.std, made.interpolation, made.crop_pct) == ((0, 0, 0), (1, 1, 1), "bilinear", 1.0)
    with pytest.raises(UsageError, match="1 values for 3 channels"):
        preparation(tiny_vit, mean=(0.5,))


def test_model_that_does_not_say_how_needs_options() -> None:
    with pytest.raises(UsageError, match="image_size, mean, std"):
        preparation(nn.Linear(1, 1))


def test_each_image_is_prepared_once(tiny_vit: nn.Module) -> None:
    touched: list[int] = []
    data = noise()

    def make(index: int) -> Any:
        touched.append(index)
        return data[index]["image"]

    lazy = Examples("lazy", {"image": Lazy(10, make), "label": list(data.labels())})
    task = task_of(tiny_vit, lazy)
    for _ in range(3):
        list(task.calibration(4))
    assert sorted(touched) == list(range(10))


def test_images_beyond_the_memory_limit_are_prepared_again_and_stay_equal(tiny_vit: nn.Module) -> None:
    data = noise(4)
    one = 3 * 32 * 32
    small = PreparedImages(data.column("image"), preparation(tiny_vit), "noise", limit=2 * one)
    whole = PreparedImages(data.column("image"), preparation(tiny_vit), "noise")
    for _ in range(2):
        (expected,) = whole.stream([[0, 1, 2, 3]])
        assert torch.equal(torch.cat(list(small.stream([[0, 1], [2, 3]]))), expected)


def test_calibration_order_depends_on_the_seed_alone(tiny_vit: nn.Module) -> None:
    task = task_of(tiny_vit, noise())

    def targets(seed: int, batch_size: int) -> list[int]:
        batches = task.calibration(batch_size, limit=6, seed=seed)
        return torch.cat([b.target for b in batches if b.target is not None]).tolist()

    assert targets(0, 2) == targets(0, 5)
    assert targets(0, 2) != targets(1, 2)
    assert sorted(targets(0, 2)) == sorted(targets(1, 2))


def test_limit_takes_evenly_spaced_examples(tiny_vit: nn.Module) -> None:
    data = Examples("sorted", {"image": list(noise().column("image")), "label": [0] * 5 + [4] * 5})
    (batch,) = task_of(tiny_vit, data).evaluation(4, limit=4)
    assert batch.target is not None and batch.target.tolist() == [0, 0, 4, 4]


def test_top1_counts_right_first_answers(tiny_vit: nn.Module) -> None:
    task = task_of(tiny_vit, noise(10))

    def constant(inputs: dict[str, Tensor]) -> Tensor:
        return torch.eye(5)[2].expand(len(inputs["pixel_values"]), 5)

    quality = task.evaluate(constant, batch_size=3)
    assert (quality.metric, quality.value, quality.n) == ("top1", 0.2, 10)
    assert quality.per_example.tolist() == [0, 0, 1, 0, 0] * 2
    assert task.evaluate(lambda inputs: constant(inputs).numpy()).value == 0.2


def test_loss_is_cross_entropy_and_distance_vanishes_at_the_dense_output(tiny_vit: nn.Module) -> None:
    task = task_of(tiny_vit, noise())
    batch = next(task.calibration(4))
    output = task.signature.call(tiny_vit, batch.inputs)
    assert output.shape == (4, 5)
    assert batch.target is not None
    expected = -output.log_softmax(-1)[torch.arange(4), batch.target]
    torch.testing.assert_close(task.loss(output, batch), expected)
    torch.testing.assert_close(task.distance(output, output, batch), torch.zeros(4))
    moved = task.distance(output + torch.randn_like(output), output, batch)
    assert moved.shape == (4,) and (moved > 0).all()
    moved.sum().backward()


def test_labels_outside_the_models_classes_are_refused(tiny_vit: nn.Module) -> None:
    with pytest.raises(DataError, match="0 to 4"):
        task_of(tiny_vit, noise(classes=6))


def test_unlabeled_images_are_refused_unless_agreement_is_asked(tiny_vit: nn.Module) -> None:
    data = Examples("bare", {"image": list(noise().column("image"))})
    with pytest.raises(DataError, match="metric=agreement"):
        task_of(tiny_vit, data)
    task = task_of(tiny_vit, data, metric="agreement")

    def dense(inputs: dict[str, Tensor]) -> Tensor:
        return task.signature.call(tiny_vit, inputs)

    assert task.evaluate(dense, reference=dense).value == 1.0
    cached = task.reference_answers(dense, limit=4)
    assert task.evaluate(lambda inputs: -dense(inputs), limit=4, reference=cached, batch_size=3).value == 0.0
    with pytest.raises(UsageError, match="reference="):
        task.evaluate(dense)
    with pytest.raises(UsageError, match="too few rows"):
        task.evaluate(dense, reference=cached)
    with pytest.raises(DataError, match="unlabeled"):
        task.loss(torch.zeros(1, 5), next(task.calibration(1)))


def test_output_that_is_not_finite_is_refused(tiny_vit: nn.Module) -> None:
    with pytest.raises(GateError, match="not finite"):
        task_of(tiny_vit, noise()).evaluate(lambda inputs: torch.full((len(inputs["pixel_values"]), 5), torch.nan))


def test_float_images_must_have_the_models_size_and_range(tiny_vit: nn.Module) -> None:
    small = Examples("small", {"image": np.zeros((2, 8, 8, 3), np.float32), "label": [0, 1]})
    with pytest.raises(DataError, match="not of the model's size"):
        next(task_of(tiny_vit, small).evaluation(1))
    bright = Examples("bright", {"image": np.full((2, 32, 32, 3), 200.0, np.float32), "label": [0, 1]})
    with pytest.raises(DataError, match=r"outside \[0, 1\]"):
        next(task_of(tiny_vit, bright).evaluation(1))


def test_column_that_holds_no_images_is_refused(tiny_vit: nn.Module) -> None:
    with pytest.raises(DataError, match="not an image"):
        next(task_of(tiny_vit, Examples("names", {"image": ["a.jpg"], "label": [0]})).evaluation(1))


def test_unknown_task_option_and_metric_suggest_the_nearest(tiny_vit: nn.Module) -> None:
    with pytest.raises(UsageError, match="Did you mean 'crop_pct'"):
        task_of(tiny_vit, noise(), crop_pc=1.0)
    with pytest.raises(UsageError, match="Did you mean 'top1'"):
        task_of(tiny_vit, noise(), metric="top5")
    with pytest.raises(UsageError, match="Did you mean 'image-classification'"):
        load_task("image-clasification", model=tiny_vit, model_ref="made", calibration="digits")


def test_task_without_evaluation_data_can_calibrate_but_not_report(tiny_vit: nn.Module) -> None:
    task = load_task("image-classification", model=tiny_vit, model_ref="made", calibration=noise())
    assert task.evaluation_size == 0 and len(list(task.calibration(5))) == 2
    with pytest.raises(DataError, match="no evaluation data"):
        task.evaluate(lambda inputs: torch.zeros(1, 5))


@pytest.mark.slow
def test_vit_tiny_reaches_its_known_accuracy_on_real_images(data_dir: Path) -> None:
    from deploy_prune.sources import load_model

    ref = f"timm:vit_tiny_patch16_224@{data_dir}/models/vit_tiny_patch16_224.augreg_in1k.safetensors"
    model = load_model(ref)
    data = load_data(f"imagefolder:{data_dir}/imagenet/validation")
    task = load_task("image-classification", model=model, model_ref=ref, calibration=data, evaluation=data)
    quality = task.evaluate(lambda inputs: task.signature.call(model, inputs), limit=65)
    assert quality.interval[0] < 0.840 < quality.interval[1]
    assert quality.value > 0.75
