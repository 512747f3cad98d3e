"""A model for trying things out: a small vision transformer, trained in seconds on scikit-learn's digits.

python:deploy_prune.demo:digits_vit       trained (97 % on `digits:test`), the same weights on every call
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deploy_prune.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor, nn

MEAN, STD = 0.305, 0.376  # of all pixels of digits:train, in [0, 1]
EPOCHS, BATCH, PEAK_RATE = 12, 64, 3e-3  # seconds on one core, and above 96 % for every seed tried


def digits_vit_untrained(width: int = 64, depth: int = 4, heads: int = 4) -> nn.Module:
    """timm VisionTransformer for one-channel 8x8 images, patches of 2x2, ten classes; with random weights."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=4.0,
    )
    model.pretrained_cfg = {
        "input_size": (1, 8, 8),
        "mean": (MEAN,),
        "std": (STD,),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "num_classes": 10,
    }
    arguments: dict[str, Any] = {"width": width, "depth": depth, "heads": heads}
    Architecture("python", "deploy_prune.demo:digits_vit_untrained", arguments).attach(model)
    return model.eval()


def digits_vit(seed: int = 0, epochs: int = EPOCHS) -> nn.Module:
    """The same model trained on `digits:train`, in eval mode.

    Training runs on one thread, because sums over several differ in their last bits; the caller's random state and
    thread count are left as they were.
    """
    import numpy as np
    import torch

    from deploy_prune.data import load_data

    data = load_data("digits:train")
    images = torch.from_numpy(np.stack(list(data.column("image"))))[:, None].sub_(MEAN).div_(STD)
    labels = torch.tensor(list(data.labels()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            model = _trained(_spread_out(digits_vit_untrained()).train(), images, labels, epochs)
    finally:
        torch.set_num_threads(threads)
    return model.eval()


def _trained(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    import torch
    from torch.nn.functional import cross_entropy

    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.05)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(BATCH):
            if len(rows) < BATCH:
                continue
            loss = cross_entropy(model(images[rows]), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()
    return model


def _spread_out(model: nn.Module) -> nn.Module:
    """Start from activations of size one: timm's own start, meant for long schedules, learns too slowly here."""
    import torch
    from torch.nn.init import normal_, zeros_

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in ("pos_embed", "cls_token"):
                normal_(parameter, std=0.5)
            elif name == "head.weight":
                zeros_(parameter)
            elif parameter.ndim > 1:
                normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model
