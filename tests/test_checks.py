"""What a recipe asks of a model that the model cannot do is refused before any work."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import BertConfig, CLIPConfig, LlamaConfig, RobertaConfig

from deploy_prune.errors import UsageError
from deploy_prune.pipeline.checks import check_model
from deploy_prune.recipe import load_recipe
from deploy_prune.tasks.tokens import longest_text

CONFIGS = {
    "BERT": (BertConfig(max_position_embeddings=64), 64),
    "RoBERTa, whose positions begin after the padding id": (RobertaConfig(max_position_embeddings=66), 64),
    "CLIP, whose text tower has them": (CLIPConfig(text_config={"max_position_embeddings": 77}), 77),
    "Llama": (LlamaConfig(max_position_embeddings=64), 64),
    "no bound": (SimpleNamespace(max_position_embeddings=-1), None),
    "no text": (None, None),
}


@pytest.mark.parametrize(("config", "longest"), CONFIGS.values(), ids=CONFIGS)
def test_sizes_to_time_fit_the_model(config, longest):
    assert longest_text(config) == longest
    model = SimpleNamespace(config=config)
    most = longest or 10**6
    check_model(load_recipe("digits", [f"bench.seq=[8,{most}]"]), model)
    if longest:
        with pytest.raises(UsageError, match=f"at most {longest}"):
            check_model(load_recipe("digits", [f"bench.seq=[8,{longest + 1}]"]), model)
        check_model(load_recipe("digits", [f"bench.seq=[{longest + 1}]", "bench.enabled=false"]), model)
