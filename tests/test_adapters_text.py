"""What the text adapters refuse, and what they leave alone."""

from __future__ import annotations

import pytest
from forms import output, random_path, relative_error, signature_of

from converters.surgery import compact
from deploy_prune.adapters import adapter_for, find_sites
from deploy_prune.errors import UnsupportedModelError
from deploy_prune.gates import masked
from deploy_prune.units import UnitKind


def test_alibi_decoders_are_refused_with_the_reason():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(UnsupportedModelError, match="ALiBi"):
        find_sites(model)


@pytest.mark.parametrize("prefix", ["Bert", "Roberta"])
def test_cross_attention_is_refused(prefix):
    import transformers

    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        is_decoder=True,
        add_cross_attention=True,
    )
    with pytest.raises(UnsupportedModelError, match="cross-attention"):
        find_sites(getattr(transformers, f"{prefix}Model")(config))


@pytest.mark.parametrize("name", ["tiny_xlm_roberta", "tiny_camembert"])
def test_twins_of_roberta_are_cut_as_it_is(name, request):
    model, signature = request.getfixturevalue(name), signature_of("tiny_roberta")
    plan = random_path(model, signature, seed=2).plan(0.4)
    with masked(model, find_sites(model), plan):
        expected = output(model, signature)
    assert relative_error(output(compact(model, plan), signature), expected) < 1e-5


@pytest.mark.parametrize("name", ["tiny_roberta", "tiny_albert", "tiny_distilbert", "tiny_qwen2", "tiny_opt_350m"])
def test_eager_attention_is_cut_as_well(name, request):
    model, signature = request.getfixturevalue(name), signature_of(name)
    model.set_attn_implementation("eager")
    plan = random_path(model, signature, seed=2).plan(0.4)
    with masked(model, find_sites(model), plan):
        expected = output(model, signature)
    small = compact(model, plan)
    assert small.config._attn_implementation == "eager"
    assert relative_error(output(small, signature), expected) < 1e-5


def test_gpt2_that_computes_scores_in_its_own_way_is_cut_as_well(tiny_gpt2):
    signature = signature_of("tiny_gpt2")
    tiny_gpt2.set_attn_implementation("eager")
    for block in tiny_gpt2.transformer.h:
        block.attn.reorder_and_upcast_attn = True
    plan = random_path(tiny_gpt2, signature, seed=2).plan(0.4)
    with masked(tiny_gpt2, find_sites(tiny_gpt2), plan):
        expected = output(tiny_gpt2, signature)
    assert relative_error(output(compact(tiny_gpt2, plan), signature), expected) < 1e-5


def test_attention_of_another_class_is_refused_by_name(tiny_gpt2):
    class Mine(type(tiny_gpt2.transformer.h[1].attn)):
        pass

    tiny_gpt2.transformer.h[1].attn.__class__ = Mine
    with pytest.raises(UnsupportedModelError, match=r"transformer\.h\.1\.attn: Mine, expected plain GPT2Attention"):
        find_sites(tiny_gpt2)


def test_normed_queries_offer_no_qk_and_say_why(tiny_qwen3):
    attention = find_sites(tiny_qwen3)[0]
    assert UnitKind.QK not in attention.counts
    assert attention.limits is not None and "norm" in attention.limits[UnitKind.QK]


def test_layers_without_rotary_embedding_offer_single_dimensions(tiny_smollm3):
    turned, still = (site for site in find_sites(tiny_smollm3) if site.heads)
    assert (turned.counts[UnitKind.QK], still.counts[UnitKind.QK]) == (4, 8)


STAYS = {
    "tiny_bert": "bert.embeddings.word_embeddings bert.embeddings.position_embeddings "
    "bert.embeddings.token_type_embeddings bert.pooler.dense classifier",
    "tiny_gpt2": "transformer.wte transformer.wpe lm_head",
    "tiny_opt_350m": "model.decoder.embed_tokens model.decoder.embed_positions model.decoder.project_in "
    "model.decoder.project_out lm_head",
    "tiny_mobilellm": "model.embed_tokens lm_head",
}


@pytest.mark.parametrize("name", STAYS)
def test_embeddings_poolers_and_heads_stay_and_are_named(name, request):
    model = request.getfixturevalue(name)
    assert {module for module, _ in adapter_for(model).untouched(model)} == set(STAYS[name].split())
