"""Tiny vision models with random weights: 32x32 RGB in, 5 classes, two blocks a family can be told by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import nn


def _timm(name: str, **more: Any) -> nn.Module:
    from conftest import randomize

    from deploy_prune.architecture import Architecture

    small = {"img_size": 32, "num_classes": 5}
    return randomize(Architecture("timm", name, {**small, **more}).build())


def _timm_vit(name: str, **more: Any) -> nn.Module:
    return _timm(name, patch_size=8, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2.0, **more)


@pytest.fixture
def tiny_deit_distilled() -> nn.Module:
    """Two tokens and two heads, averaged."""
    return _timm_vit("deit_tiny_distilled_patch16_224")


@pytest.fixture
def tiny_deit3() -> nn.Module:
    """LayerScale after every sublayer."""
    return _timm_vit("deit3_small_patch16_224")


@pytest.fixture
def tiny_timm_dinov2() -> nn.Module:
    """LayerScale, register tokens, packed SwiGLU."""
    return _timm_vit("vit_giant_patch14_reg4_dinov2")


@pytest.fixture
def tiny_vit_qk_norm() -> nn.Module:
    """A norm over every head's queries and keys, attention pooling with its own feed-forward."""
    return _timm_vit("vit_base_patch16_siglip_224", qk_norm=True)


@pytest.fixture
def tiny_vit_clip() -> nn.Module:
    """CLIP's image tower: a norm before the first block, QuickGELU."""
    return _timm_vit("vit_base_patch16_clip_quickgelu_224")


@pytest.fixture
def tiny_swin() -> nn.Module:
    """Two stages of two blocks, windows of 4x4, the second of each stage shifted."""
    return _timm("swin_tiny_patch4_window7_224", patch_size=4, **_SWIN)


@pytest.fixture
def tiny_swinv2() -> nn.Module:
    """As Swin, with cosine attention, a small network for the position bias, and norms after the sublayers."""
    return _timm("swinv2_tiny_window8_256", patch_size=4, **_SWIN)


_SWIN = {"window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6), "mlp_ratio": 2.0}


def _needs_518() -> None:
    """DINOv2 is understood as transformers has had it since 5.18."""
    import transformers

    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18):
        pytest.skip("DINOv2 needs transformers 5.18")


def _hf(prefix: str, kind: str, **settings: Any) -> nn.Module:
    import transformers
    from conftest import randomize

    config = getattr(transformers, f"{prefix}Config")(attn_implementation="sdpa", **settings)
    return randomize(getattr(transformers, f"{prefix}{kind}")(config))


_IMAGE = {"image_size": 32, "num_labels": 5}
_HF_VIT = {
    **_IMAGE,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
}
_HF_SWIN = {**_IMAGE, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4}


@pytest.fixture
def tiny_hf_vit() -> nn.Module:
    return _hf("ViT", "ForImageClassification", **_HF_VIT)


@pytest.fixture
def tiny_hf_deit() -> nn.Module:
    """Two tokens and two heads, averaged."""
    return _hf("DeiT", "ForImageClassificationWithTeacher", **_HF_VIT)


@pytest.fixture
def tiny_hf_dinov2() -> nn.Module:
    """LayerScale, plain feed-forward."""
    _needs_518()
    return _hf("Dinov2", "ForImageClassification", **{**_HF_VIT, "mlp_ratio": 2})


@pytest.fixture
def tiny_hf_dinov2_registers() -> nn.Module:
    """LayerScale, register tokens, gated feed-forward."""
    _needs_518()
    return _hf("Dinov2WithRegisters", "ForImageClassification", use_swiglu_ffn=True, **{**_HF_VIT, "mlp_ratio": 2})


@pytest.fixture
def tiny_hf_swin() -> nn.Module:
    return _hf("Swin", "ForImageClassification", **{**_HF_SWIN, "mlp_ratio": 2.0})


@pytest.fixture
def tiny_hf_swinv2() -> nn.Module:
    import transformers
    from conftest import randomize

    config = transformers.Swinv2Config(**{**_HF_SWIN, "mlp_ratio": 2.0})  # it computes its attention by itself
    return randomize(transformers.Swinv2ForImageClassification(config))


@pytest.fixture
def tiny_clip() -> nn.Module:
    """Image tower of two layers and text tower of two, joined in a space of 24."""
    import transformers
    from conftest import randomize

    tower = {"num_hidden_layers": 2, "num_attention_heads": 3, "hidden_size": 48, "intermediate_size": 96}
    config = transformers.CLIPConfig(
        text_config={
            **tower,
            "vocab_size": 99,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,  # as the first CLIP models say it: the highest id of a text is its end
        },
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=24,
        attn_implementation="sdpa",
    )
    return randomize(transformers.CLIPModel(config))
