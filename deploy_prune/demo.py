"""A model for trying things out: a small vision transformer, trained in seconds on scikit-learn's digits.

python:deploy_prune.demo:digits_vit       trained (97 % on `digits:test`), the same weights on every call
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.architecture import Architecture, weights_sha256
from deploy_prune.cache import cache_root
from deploy_prune.errors import ArtifactError, UnavailableError
from deploy_prune.files import atomic_file

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)
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

    It is trained once and kept in the user's cache, under all that its bits depend on. Training runs on one thread,
    because sums over several differ in their last bits; the caller's random state and thread count are left as they
    were.
    """
    file = cache_root() / "digits" / f"{_key(seed, epochs)}.safetensors"
    model = _kept(file)
    if model is None:
        model = digits_vit_trained(seed, epochs)
        _keep(model, file)
    return model


def digits_vit_trained(seed: int, epochs: int) -> nn.Module:
    """`digits_vit` anew."""
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


def _key(seed: int, epochs: int) -> str:
    """A name for all that the trained weights depend on: this file, the libraries, the processor's instructions."""
    from importlib.metadata import version
    from platform import machine

    import torch

    parts = [seed, epochs, *(version(name) for name in ("torch", "timm", "scikit-learn")), machine()]
    parts.append(torch.backends.cpu.get_cpu_capability())
    return hashlib.sha256(Path(__file__).read_bytes() + repr(parts).encode()).hexdigest()[:32]


def _kept(file: Path) -> nn.Module | None:
    """The model whose weights the cache has, None if it has none that can be read."""
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    if not os.path.isfile(file):  # False, and no error, where it may not even be looked for
        return None
    with torch.random.fork_rng(devices=[]):
        model = digits_vit_untrained()
    try:
        model.load_state_dict(load_file(file))
        with safe_open(file, framework="pt") as opened:
            if (opened.metadata() or {}).get("sha256") != weights_sha256(model):
                raise ArtifactError("its weights are not those that were kept")
    except (SafetensorError, OSError, RuntimeError, ArtifactError) as error:
        log.warning("Training the demo's model again: what the cache has is damaged (%s): %s", file, error)
        return None
    return model


def _keep(model: nn.Module, file: Path) -> None:
    from safetensors.torch import save_file

    try:
        with atomic_file(file) as temporary:
            save_file(model.state_dict(), temporary, metadata={"sha256": weights_sha256(model)})
    except UnavailableError as error:
        log.warning("The demo's model cannot be kept, and will be trained again next time: %s", error)


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
