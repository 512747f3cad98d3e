"""Fixtures every test file may use: tiny models with random weights, and the place of the real data."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may reach for the network

import pytest
from tiny_text import *  # noqa: F403 - fixtures
from tiny_vision import *  # noqa: F403 - fixtures

if TYPE_CHECKING:
    from torch import nn


@pytest.fixture(autouse=True)
def process_threads_stay() -> Iterator[None]:
    """No test leaves torch with another number of threads: later ones in the process would sum in another order."""
    torch = sys.modules.get("torch")  # not imported here: it takes seconds, and many tests do without
    before = torch.get_num_threads() if torch else None
    yield
    if torch and torch.get_num_threads() != before:
        left = torch.get_num_threads()
        torch.set_num_threads(before)
        pytest.fail(f"torch had {before} threads before the test and has {left} after it")


@pytest.fixture(autouse=True)
def exporter_reads_its_translations_once() -> Iterator[None]:
    """torch's exporter parses the sources of its 500 translations at every export, which takes a second; here once."""
    yield
    for name, module in list(sys.modules.items()):
        if name.startswith("onnxscript._framework_apis.torch_") and not hasattr(module.get_torchlib_ops, "cache_info"):
            module.get_torchlib_ops = functools.cache(module.get_torchlib_ops)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Root of the real data (models/, imagenet/, glue/, wikitext2/, ...)."""
    location = os.environ.get("DEPLOY_PRUNE_DATA")
    if not location:
        pytest.skip("DEPLOY_PRUNE_DATA is not set: no real data here")
    return Path(location)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a seeded random value under which activations keep their size and no bias is zero.

    Returns the same model in eval mode.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 0:
                parameter.fill_(1.0)
            elif parameter.ndim == 1:
                is_norm_scale = "norm" in name.lower() and name.endswith("weight")
                parameter.copy_(0.2 * noise + (1.0 if is_norm_scale else 0.0))
            else:
                parameter.copy_(noise / max(1, parameter[0].numel()) ** 0.5)
    return model.eval()


@pytest.fixture
def tiny_vit() -> nn.Module:
    """timm VisionTransformer, 32x32 RGB in, 5 classes; 2 blocks, width 48, 3 heads of 16, 96 neurons."""
    from deploy_prune.architecture import Architecture

    arguments: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 3,
        "mlp_ratio": 2.0,
        "num_classes": 5,
    }
    return randomize(Architecture("timm", "vit_tiny_patch16_224", arguments).build())


@pytest.fixture
def tiny_bert() -> nn.Module:
    """BertForSequenceClassification, 3 classes, vocabulary 99; 2 layers, width 32, 4 heads of 8, 48 neurons."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=3,
        attn_implementation="sdpa",
    )
    return randomize(BertForSequenceClassification(config))


@pytest.fixture
def tiny_distilbert() -> nn.Module:
    """DistilBertForSequenceClassification, 2 classes, vocabulary 99; 2 layers, width 32, 4 heads of 8, 48 neurons."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=99,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=48,
        max_position_embeddings=64,
        num_labels=2,
        attn_implementation="sdpa",
    )
    return randomize(DistilBertForSequenceClassification(config))


@pytest.fixture
def tiny_llama() -> nn.Module:
    """LlamaForCausalLM, vocabulary 99, tied; 2 layers, width 32, 4 query and 2 key-value heads of 8, 48 neurons."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    return randomize(LlamaForCausalLM(config))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[nn.Module], Path]:
    """Saves a tiny HF model with a word-level tokenizer ("w0" ... "w94") as a model folder; returns the folder."""

    def save(model: Any) -> Path:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(95))]
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
            backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="[PAD]",
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            model_max_length=40,
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        ).save_pretrained(folder)
        return folder

    return save
