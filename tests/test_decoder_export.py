"""Decoders with their cache: one graph is torch in prefill and in steps, writes what torch writes, and is refused when
it is damaged."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from decoders import build, exported, written
from onnx import numpy_helper
from onnx_models import save_mlp

from converters.cache import cache_slots
from converters.decoder_export import export_decoder
from converters.decoder_parity import check_decoder
from converters.generation import OnnxDecoder, Text, answered, generate
from deploy_prune.errors import ArtifactError, ParityError, UnavailableError, UnsupportedModelError, UsageError

PROMPTS = [[5, 17, 33, 80], [9, 61], [44]]
CASES = [
    ("tiny_llama", "uneven"),
    ("tiny_mobilellm", "gone"),  # the block serves two depths: both of its caches are gone
    ("tiny_mistral", "heads"),  # a sliding window of 6
    ("tiny_opt", "gone"),
    ("tiny_gpt2", "uneven"),
]
MORE = [(name, "uneven") for name in ("tiny_mistral", "tiny_qwen2", "tiny_qwen3", "tiny_smollm3", "tiny_opt_350m")]
ALL = [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]


@pytest.mark.parametrize(("name", "how"), ALL)
def test_decoder_writes_token_for_token_what_torch_writes_for_64_steps(name, how):
    model, directory, _ = exported(name, how)
    tokens = 64 - max(map(len, PROMPTS))  # all positions there are
    got = generate(OnnxDecoder(directory / "model.onnx"), PROMPTS, tokens, stop=())
    assert got == written(model, PROMPTS, tokens)


@pytest.mark.parametrize(("name", "how"), ALL)
def test_decoder_equals_torch_in_prefill_steps_and_pieces(name, how):
    model, directory, _ = exported(name, how)
    example = {
        "input_ids": torch.tensor([[7, 8, 9, 10, 11, 12]]),
        "attention_mask": torch.ones((1, 6), dtype=torch.int64),
    }
    report = check_decoder(model, directory / "model.onnx", examples=[example])
    assert report.error < 1e-5
    assert [check.sizes["pieces"] for check in report.checks] == [1, 4, 4, 4, 5]


@pytest.mark.parametrize(
    ("name", "how", "variant"),
    [("tiny_llama", "uneven", "ort"), ("tiny_opt", "gone", "standard"), ("tiny_gpt2", "uneven", "plain")],
)
def test_a_decoder_of_last_logits_is_proved_by_them_and_writes_the_same(name, how, variant):
    model, directory, report = exported(name, how, variant, last_logits=True)
    file = directory / "model.onnx"
    assert report.outputs[0]["shape"] == ["batch", 1, model.config.vocab_size]
    assert check_decoder(model, file).error < 1e-5
    decoder = OnnxDecoder(file)
    assert answered(decoder, (5, 1, 4)).tolist() == [4, 5, 9]
    assert decoder.read(np.ones((2, 7), np.int64), np.ones((2, 7), np.int64))[0].shape == (2, 1, 99)
    assert generate(decoder, PROMPTS, 40, stop=()) == written(model, PROMPTS, 40)


def test_a_decoder_of_last_logits_that_answers_for_another_token_is_refused(tmp_path):
    model, directory, _ = exported("tiny_llama", "uneven", "plain", last_logits=True)
    proto = onnx.load(directory / "model.onnx")
    makers = {name: node for node in proto.graph.node for name in node.output}
    node, waiting = None, ["logits"]
    while node is None or node.op_type != "Slice":
        node = makers[waiting.pop(0)]
        waiting += [name for name in node.input if name in makers]
    starts = next(i for i in proto.graph.initializer if i.name == node.input[1])
    assert numpy_helper.to_array(starts).tolist() == [-1]
    node.input[1], node.input[2] = "first", "second"
    proto.graph.initializer.extend(
        [numpy_helper.from_array(np.array([value], np.int64), name) for name, value in (("first", 0), ("second", 1))]
    )
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(ParityError, match="the decoder with a cache is not the model"):
        check_decoder(model, tmp_path / "model.onnx")


def test_a_model_that_always_computes_all_logits_is_refused_for_last_ones(monkeypatch, tmp_path):
    model = build("tiny_llama")
    whole = type(model).forward

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        return whole(self, input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache)

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(UnsupportedModelError, match="always computes the logits of all tokens"):
        export_decoder(model, tmp_path / "out", last_logits=True)


@pytest.mark.parametrize(("name", "how"), [("tiny_llama", "uneven"), ("tiny_mistral", "heads")])
def test_fused_decoder_writes_what_torch_writes_and_equals_it_however_it_is_fed(name, how):
    model, directory, _ = exported(name, how, "ort")
    assert check_decoder(model, directory / "model.onnx").error < 1e-5
    assert generate(OnnxDecoder(directory / "model.onnx"), PROMPTS, 60, stop=()) == written(model, PROMPTS, 60)
    ops = [node.op_type for node in onnx.load(directory / "model.onnx").graph.node]
    assert ops.count("RotaryEmbedding") == 4 and ops.count("Div") >= 5 and "Reciprocal" not in ops and "Neg" not in ops


def test_caches_have_the_shapes_of_their_layers_and_vanished_attention_has_none():
    _, directory, report = exported("tiny_llama", "uneven")
    assert len({(slot.heads, slot.key_width, slot.value_width) for slot in report.caches}) == 2
    assert any(slot.key_width != slot.value_width for slot in report.caches)
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in onnx.load(directory / "model.onnx").graph.input
    }
    for number, slot in enumerate(report.caches):
        assert shapes[f"past_key_values.{number}.key"] == ["batch", slot.heads, "past_sequence", slot.key_width]
        assert shapes[f"past_key_values.{number}.value"] == ["batch", slot.heads, "past_sequence", slot.value_width]
    assert [slot.depth for slot in exported("tiny_mobilellm", "gone")[2].caches] == [2, 3]
    assert [slot.depth for slot in exported("tiny_opt", "gone")[2].caches] == [1]


def test_positions_go_on_after_padding_on_the_left_wherever_it_is():
    decoder = OnnxDecoder(exported("tiny_gpt2", "uneven")[1] / "model.onnx")
    together = generate(decoder, PROMPTS, 12, stop=())
    assert together == [generate(decoder, [prompt], 12, stop=())[0] for prompt in PROMPTS]


def test_a_row_ends_with_its_stop_token_and_the_others_go_on():
    decoder = OnnxDecoder(exported("tiny_llama", "uneven")[1] / "model.onnx")
    free = generate(decoder, PROMPTS, 20, stop=())
    stop = next(t for t in free[0] if t not in free[1])
    first, second, _ = generate(decoder, PROMPTS, 20, stop=[stop])
    assert first == free[0][: free[0].index(stop) + 1]
    assert second == free[1]
    assert decoder.about.stop == (2,)  # the model's own
    assert decoder.about.longest == 64


def test_what_cannot_be_generated_is_refused():
    decoder = OnnxDecoder(exported("tiny_llama", "uneven")[1] / "model.onnx")
    with pytest.raises(UsageError, match=r"at most 64(.|\n)*4 of the prompt and 61 new"):
        generate(decoder, PROMPTS, 61)
    for prompts, tokens in (([[]], 3), ([], 3), ([[1]], 0)):
        with pytest.raises(UsageError, match="nothing to go on"):
            generate(decoder, prompts, tokens)


def test_a_plain_onnx_file_is_no_decoder(tmp_path):
    with pytest.raises(ArtifactError, match=r"not a decoder with a key/value cache"):
        OnnxDecoder(save_mlp(tmp_path / "mlp.onnx"))


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="there is a GPU runtime")
def test_a_gpu_that_is_not_there_is_said_to_be_missing_and_nothing_runs_on_the_cpu_instead():
    with pytest.raises(UnavailableError, match="this onnxruntime has no CUDA"):
        OnnxDecoder(exported("tiny_llama", "uneven")[1] / "model.onnx", device="cuda")


def damaged(directory, tmp_path, change):
    """The graph of `directory` with its initialisers or nodes changed."""
    model = onnx.load(directory / "model.onnx")
    change(model.graph)
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_one_wrong_weight_is_caught(tmp_path):
    model, directory, report = exported("tiny_llama", "uneven")

    def change(graph):
        weight = next(i for i in graph.initializer if i.name in report.export.initializers.weights)
        values = numpy_helper.to_array(weight).copy()
        values.flat[3] += 1e-6
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))

    with pytest.raises(ParityError, match=r"differs in 1 of"):
        check_decoder(model, damaged(directory, tmp_path, change))


def test_caches_in_another_order_are_caught(tmp_path):
    model, directory, _ = exported("tiny_mobilellm", "gone")

    def change(graph):
        names = {"past_key_values.0.key": "past_key_values.1.key", "past_key_values.1.key": "past_key_values.0.key"}
        for node in graph.node:
            for i, name in enumerate(node.input):
                node.input[i] = names.get(name, name)

    with pytest.raises(ParityError, match=r"at pieces \(1, 1, 1, 1\)"):
        check_decoder(model, damaged(directory, tmp_path, change))


def test_another_export_of_the_model_gives_the_same_bytes(tmp_path):
    model, _, report = exported("tiny_gpt2", "uneven")
    assert export_decoder(model, tmp_path / "again").export.sha256 == report.export.sha256


def test_model_without_a_cache_is_refused(tiny_bert, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"does not decode with a key/value cache"):
        export_decoder(tiny_bert, tmp_path / "bert")
    assert not (tmp_path / "bert").exists()


def test_slots_of_a_dense_model_are_all_alike():
    assert {(s.heads, s.key_width, s.value_width) for s in cache_slots(build("tiny_mobilellm"))} == {(2, 8, 8)}
    assert len(cache_slots(build("tiny_mobilellm"))) == 4


def test_text_goes_to_ids_and_back_without_special_tokens():
    text = Text(exported("tiny_llama", "uneven")[1] / "tokenizer.json")
    assert text.ids("w3 w0") == [7, 4]
    assert text.text([7, 4, 2]) == "w3 w0"


@pytest.mark.parametrize("name", ["tiny_opt", "tiny_mistral", "tiny_mobilellm"])
def test_onnxruntime_genai_writes_the_same_with_other_heads_in_every_layer(name):
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    how = {"tiny_mobilellm": "gone"}.get(name, "heads")
    model, directory, report = exported(name, how)
    assert report.genai_refused is None
    if how == "heads":
        assert len({slot.heads for slot in report.caches}) > 1
    loaded = genai.Model(str(directory))
    options = genai.GeneratorParams(loaded)
    options.set_search_options(max_length=40, min_length=40, do_sample=False)
    for prompt in PROMPTS[:2]:
        generator = genai.Generator(loaded, options)
        generator.append_tokens(np.array([prompt], np.int32))
        made = []
        for _ in range(24):
            generator.generate_next_token()
            made.append(int(generator.get_next_tokens()[0]))
        assert made == without_stop(model, directory, prompt, 24)


def without_stop(model, directory, prompt, tokens):
    """What `min_length` makes of greedy decoding: the stop token is never chosen."""
    import torch

    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = 2
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
    )
    return made[0, len(prompt) :].tolist()


def test_onnxruntime_genai_is_not_promised_where_keys_and_values_differ_in_width():
    _, directory, report = exported("tiny_llama", "uneven")
    assert "one width for the keys and values" in report.genai_refused
    assert not (directory / "genai_config.json").exists()


def test_a_file_that_fails_as_it_runs_is_told_as_a_damaged_one(tmp_path):
    _, directory, _ = exported("tiny_llama", "uneven")

    def change(graph):
        (shape,) = (
            i for i in graph.initializer if i.name == next(n for n in graph.node if n.op_type == "Gather").input[0]
        )
        shape.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(shape)[:3].copy(), shape.name))

    decoder = OnnxDecoder(damaged(directory, tmp_path, change))
    with pytest.raises(ArtifactError, match="onnxruntime cannot run the model"):
        decoder.read(np.full((1, 2), 50), np.ones((1, 2), np.int64))
