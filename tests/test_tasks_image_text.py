"""Image-text retrieval: who is a wrong answer, what recall counts, and a CLIP folder run from the command line."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from deploy_prune.data import Examples, load_data
from deploy_prune.errors import UnavailableError, UnsupportedModelError, UsageError
from deploy_prune.sources import load_model
from deploy_prune.tasks import Batch, load_task
from deploy_prune.tasks.image_config import folder_images


@pytest.fixture
def pairs(tmp_path):
    """A data reference: 6 images, two captions each."""
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "caption"])
        for i in range(6):
            Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(tmp_path / f"photos/{i}.png")
            table.writerows([[f"{i}.png", f"w{i} w{i + 10}"], [f"{i}.png", f"w{i + 20}"]])
    return f"csv:{tmp_path}/captions.csv?image=file&text=caption&images=photos"


@pytest.fixture
def clip(tiny_clip, saved):
    """The reference of a CLIP folder with tokenizer and image preparation."""
    folder = saved(tiny_clip)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return f"hf:{folder}"


PREPROCESSOR = {
    "do_resize": True,
    "size": {"shortest_edge": 32},
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "resample": 3,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.2, 0.2],
}


@pytest.fixture
def task(clip, pairs):
    return load_task("image-text", model=load_model(clip), model_ref=clip, calibration=pairs, evaluation=pairs)


def test_a_clip_folder_is_searched_cut_and_judged(clip, pairs, task):
    import deploy_prune as dp

    model = load_model(clip)
    path = dp.search(model, task, method="fisher", batch_size=4)
    plan = path.plan(0.3)
    small = dp.compact(model, plan)
    quality = task.evaluate(lambda inputs: task.signature.call(small, inputs))
    assert (quality.n, len(quality.per_example), quality.detail["images"]) == (12, 12, 6)
    assert quality.value == quality.per_example.mean()


def test_pixels_are_those_of_the_librarys_own_image_processor(clip, pairs, task):
    from transformers import CLIPImageProcessor

    batch = next(task.evaluation(3))
    images = [load_data(pairs).column("image")[i] for i in range(3)]
    own = CLIPImageProcessor(**PREPROCESSOR)(images, return_tensors="pt")["pixel_values"]
    assert float((batch.inputs["pixel_values"] - own).abs().mean()) < 0.01  # filters of PIL and torch round apart
    assert batch.target.tolist() == [0, 0, 2]


def test_embeddings_that_match_find_each_other(task):
    batch = next(task.evaluation(12))
    rows = torch.eye(24)[batch.target]
    found = task.evaluate(lambda inputs: torch.stack([rows, rows], 1), batch_size=12)
    assert (found.value, found.detail["image to text"]) == (1.0, 1.0)
    swapped = torch.stack([rows, rows.roll(2, 0)], 1)
    assert task.evaluate(lambda inputs: swapped, batch_size=12).value == 0.0


def test_captions_of_one_image_are_not_each_others_wrong_answers(task):
    image = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), dim=-1)
    batch = Batch({}, torch.tensor([4, 4, 7]))
    loss = task.loss(torch.stack([image, image], 1), batch)
    s = task.scale
    assert loss[0] == pytest.approx(math.log(1 + math.exp(-s)), rel=1e-5)  # one wrong answer, not two
    assert loss[2] == pytest.approx(math.log(1 + 2 * math.exp(-s)), rel=1e-5)


def test_other_models_and_missing_images_are_refused(tiny_hf_vit, pairs, tmp_path):
    with pytest.raises(UnsupportedModelError, match="CLIPModel"):
        load_task("image-text", model=tiny_hf_vit, model_ref="hf:x", calibration=pairs)
    (tmp_path / "photos/3.png").unlink()
    with pytest.raises(UnavailableError, match=r"1 image files are missing"):
        load_data(pairs)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic"}),
        ({"size": {"height": 64, "width": 64}, "resample": 2}, {"crop_pct": 0.5, "crop_mode": "squash"}),
        ({"do_normalize": False}, {"mean": [0.0] * 3, "std": [1.0] * 3}),
    ],
)
def test_a_preprocessor_config_is_read_in_timms_words(tmp_path, change, expected):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **change}))
    assert expected.items() <= folder_images(tmp_path).items()


@pytest.mark.parametrize("change", [{"do_rescale": False}, {"size": {"longest_edge": 3}}, {"resample": 9}])
def test_a_preparation_that_would_come_out_different_is_refused(tmp_path, change):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **change}))
    with pytest.raises(UsageError, match="not supported"):
        folder_images(tmp_path)


def test_a_transformers_image_classifier_is_a_task_by_its_folder_alone(tiny_hf_swinv2, tmp_path):
    folder = tmp_path / "swin"
    tiny_hf_swinv2.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, "do_center_crop": False}))
    ref = f"hf:{folder}"
    data = Examples("made up", {"image": [np.zeros((40, 48, 3), np.uint8)] * 2, "label": [0, 4]})
    task = load_task("image-classification", model=load_model(ref), model_ref=ref, calibration=data)
    assert (task.preparation.size, task.preparation.mean) == ((3, 32, 32), (0.5, 0.4, 0.3))
    assert next(task.calibration(2)).inputs["pixel_values"].shape == (2, 3, 32, 32)
