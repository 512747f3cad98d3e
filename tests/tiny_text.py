"""Tiny text encoders and decoders with random weights, one fixture each: 2 layers (or a little more), width 32,
4 heads of 8, 48 neurons, vocabulary 99, at most 64 positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import nn

SHAPE = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = {**SHAPE, "intermediate_size": 48, "max_position_embeddings": 66, "num_labels": 3}
LLAMA = {**SHAPE, "intermediate_size": 48, "max_position_embeddings": 64, "num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _fixture(name: str, prefix: str, kind: str, doc: str, **settings: Any) -> Callable[..., Any]:
    """A fixture `name` that gives {prefix}{kind} made of {prefix}Config."""

    def build() -> nn.Module:
        import transformers
        from conftest import randomize

        config = getattr(transformers, f"{prefix}Config")(attn_implementation="sdpa", **settings)
        return randomize(getattr(transformers, f"{prefix}{kind}")(config))

    build.__name__, build.__doc__ = name, doc
    return pytest.fixture(build)


_CLASSES, _LM = "ForSequenceClassification", "ForCausalLM"
tiny_roberta = _fixture("tiny_roberta", "Roberta", _CLASSES, "Positions follow the ids.", **ENCODER)
tiny_xlm_roberta = _fixture("tiny_xlm_roberta", "XLMRoberta", _CLASSES, "As RoBERTa in all but name.", **ENCODER)
tiny_camembert = _fixture("tiny_camembert", "Camembert", _CLASSES, "As RoBERTa in all but name.", **ENCODER)
tiny_electra = _fixture(
    "tiny_electra", "Electra", _CLASSES, "Embeddings of 16, projected.", embedding_size=16, **ENCODER
)
tiny_albert = _fixture(
    "tiny_albert",
    "Albert",
    _CLASSES,
    "4 depths share 2 layers of one group.",
    **{**ENCODER, "num_hidden_layers": 2},
    embedding_size=16,
    inner_group_num=2,
    classifier_dropout_prob=0.0,
)
tiny_mistral = _fixture("tiny_mistral", "Mistral", _LM, "A sliding window of 6.", **LLAMA, **SPECIAL, sliding_window=6)
tiny_qwen2 = _fixture("tiny_qwen2", "Qwen2", _LM, "Biases on query, key and value; untied.", **LLAMA, **SPECIAL)
tiny_qwen3 = _fixture("tiny_qwen3", "Qwen3", _LM, "Norms over query and key.", **LLAMA, **SPECIAL, head_dim=8)
tiny_smollm3 = _fixture(
    "tiny_smollm3", "SmolLM3", _LM, "Depth 1 without rotary embedding.", **LLAMA, **SPECIAL, no_rope_layers=[1, 0]
)
_OPT: dict[str, Any] = {**SHAPE, **SPECIAL, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
tiny_opt = _fixture("tiny_opt", "OPT", _LM, "Norms before, tied.", **_OPT)
tiny_opt_350m = _fixture(
    "tiny_opt_350m",
    "OPT",
    _LM,
    "Norms after; embeddings of 16, projected.",
    **{**_OPT, "word_embed_proj_dim": 16},
    do_layer_norm_before=False,
)


@pytest.fixture
def tiny_gpt2() -> nn.Module:
    """GPT2LMHeadModel, tied; scores also scaled by depth."""
    import torch
    from conftest import randomize
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=99,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=48,
        scale_attn_by_inverse_layer_idx=True,
        **SPECIAL,
        attn_implementation="sdpa",
    )
    model = randomize(GPT2LMHeadModel(config))
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.mul_(4)  # sharp scores, or a single query dimension has next to no say
    return model


@pytest.fixture
def tiny_mobilellm() -> nn.Module:
    """LlamaForCausalLM as in MobileLLM: deep and thin, grouped queries, tied; 4 depths of 2 blocks."""
    from conftest import randomize
    from transformers import LlamaConfig, LlamaForCausalLM

    from deploy_prune.sharing import share_blocks

    config = LlamaConfig(
        **{**LLAMA, **SPECIAL, "num_hidden_layers": 4}, tie_word_embeddings=True, attn_implementation="sdpa"
    )
    return randomize(share_blocks(LlamaForCausalLM(config), (0, 0, 2, 2)))
