"""Real vision weights: a plan of 30 % is the same model masked, compact and as ONNX, and still knows its classes."""

from __future__ import annotations

import pytest

from converters.onnx_export import export_onnx
from converters.parity import check_parity
from converters.surgery import compact
from deploy_prune.gates import masked
from deploy_prune.methods import search
from deploy_prune.refitting import collect_moments, refit
from deploy_prune.sources import load_model
from deploy_prune.tasks import load_task

SWIN = "img_size=32&patch_size=2&window_size=4&embed_dim=48&depths=[2,4,2]&num_heads=[3,6,12]&num_classes=10"
CASES = {
    "swin": (
        f"timm:swin_tiny_patch4_window7_224@{{data}}/models/swin_cifar10.safetensors?{SWIN}",
        "parquet:{data}/cifar10/train.parquet",
        "parquet:{data}/cifar10/test.parquet",
        {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616], "crop_pct": 1.0},
        (0.6, 0.4),
    ),
    "vit": (
        "timm:vit_tiny_patch16_224@{data}/models/vit_tiny_patch16_224.augreg_in1k.safetensors",
        "imagefolder:{data}/imagenet/calibration",
        "imagefolder:{data}/imagenet/validation",
        {},
        (0.7, 0.05),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_thirty_percent_plan_of_real_weights_is_one_model_in_three_forms(name, data_dir, tmp_path):
    ref, calibration, evaluation, options, (dense_floor, floor) = CASES[name]
    ref, calibration, evaluation = (text.format(data=data_dir) for text in (ref, calibration, evaluation))
    model = load_model(ref)
    task = load_task(
        "image-classification",
        model=model,
        model_ref=ref,
        calibration=calibration,
        evaluation=evaluation,
        **options,
    )
    signature = task.signature
    path = search(model, task, method="fisher", examples=32, batch_size=16)
    plan = path.plan(0.3)
    moments = collect_moments(model, path.sites, task.calibration(32, 64), signature)
    fitted = refit(model, plan, moments)
    small = compact(fitted, plan, check_weights=False)
    export_onnx(small, tmp_path / "small.onnx", signature)

    def reference(inputs):
        with masked(fitted, path.sites, plan):
            return signature.call(fitted, inputs)

    check_parity({"masked": reference, "compact": small, "onnx": tmp_path / "small.onnx"}, signature)
    found = {
        form: task.evaluate(lambda inputs, m=m: signature.call(m, inputs), batch_size=32, limit=96).value
        for form, m in (("dense", model), ("s30", small))
    }
    print(name, found)
    assert found["dense"] > dense_floor
    assert found["s30"] > floor
