"""Which number format long computations use where: bfloat16 only where it is faster."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "bf16", "fp32"]


def chosen_precision(asked: str, device: torch.device) -> Literal["bf16", "fp32"]:
    """bf16 or fp32; "auto" is bf16 on GPUs that have it and on CPUs with AMX (`torch.cpu` tells only by this name).

    AVX512-BF16 alone made a step of ViT-Tiny 1.7 times slower than fp32 (bench/notes.md).
    """
    if asked == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_amx_tile_supported()
        return "bf16" if fast else "fp32"
    return "bf16" if asked == "bf16" else "fp32"
