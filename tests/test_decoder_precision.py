"""Decoders with a cache in other precisions: uneven and vanished caches, every form, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from decoders import exported
from onnx import numpy_helper

from converters.decoder_export import GRAPH
from converters.generation import OnnxDecoder, generate
from converters.precision.decoders import convert_decoder
from converters.precision.formats import PRECISIONS, Limit
from converters.precision.int8 import saturates
from deploy_prune.errors import ArtifactError, ParityError, UnavailableError, UnsupportedModelError, UsageError

LOOSE = Limit(0.6, 0.3, 0.1)  # random weights are never sure


def texts(name: str, length: int = 20) -> list[dict[str, np.ndarray]]:
    vocabulary = exported(name, "uneven")[0].config.vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, (2, length))
    return [{"input_ids": ids, "attention_mask": np.ones_like(ids)}]


def folder(name: str, how: str, variant: Any = "plain") -> Path:
    path = exported(name, how, variant)[1]
    return path if path.is_dir() else path.parent


@pytest.mark.parametrize("precision", [*PRECISIONS])
@pytest.mark.parametrize(
    ("name", "how", "variant"),
    [("tiny_llama", "uneven", "ort"), ("tiny_llama", "gone", "standard"), ("tiny_gpt2", "uneven", "plain")],
)
def test_uneven_and_vanished_caches_in_every_form(
    name: str, how: str, variant: Any, precision: Any, tmp_path: Path
) -> None:
    source, narrow = folder(name, how, variant), saturates()
    report = convert_decoder(source, tmp_path / "out", precision, texts(name), limit=LOOSE, reduce_range=narrow)
    assert report.parity.error < {"fp16": 5e-3, "bf16": 4e-2, "int4-weight-only": 0.6}.get(precision, 0.2)
    graph = onnx.load(tmp_path / "out" / GRAPH).graph
    kinds = {value.type.tensor_type.elem_type for value in (*graph.input[2:], *graph.output[1:])}
    assert kinds == {{"fp16": 10, "bf16": 16}.get(precision, 1)}
    assert graph.output[0].type.tensor_type.elem_type == 1
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("precision", ["fp16", "int8-weight-only"])
def test_a_decoder_of_last_logits_is_converted_too(precision: Any, tmp_path: Path) -> None:
    source = exported("tiny_llama", "uneven", "standard", last_logits=True)[1]
    report = convert_decoder(source, tmp_path / "out", precision, texts("tiny_llama", 12), limit=LOOSE)
    assert report.parity.examples == 2 and report.parity.error < 0.1
    decoder = OnnxDecoder(tmp_path / "out" / GRAPH)
    assert len(generate(decoder, [[5, 6, 7]], 8, stop=())[0]) == 8


def test_a_kept_node_that_makes_a_cache_leaves_the_cache_in_the_format(tmp_path: Path) -> None:
    source = folder("tiny_llama", "uneven")
    graph = onnx.load(source / GRAPH).graph
    made = [node.name for node in graph.node if any(name.startswith("present.") for name in node.output)]
    report = convert_decoder(source, tmp_path / "out", "fp16", texts("tiny_llama"), keep=made, limit=LOOSE)
    assert {name for name, why in report.kept.items() if why == "asked for"} == set(made)
    outputs = onnx.load(tmp_path / "out" / GRAPH).graph.output[1:]
    assert {value.type.tensor_type.elem_type for value in outputs} == {10}


def test_a_cache_that_fp16_cannot_hold_is_refused_also_where_overflow_is_kept(tmp_path: Path) -> None:
    source = tmp_path / "loud"
    source.mkdir()
    model = onnx.load(folder("tiny_gpt2", "uneven") / GRAPH)
    for stored in model.graph.initializer:
        if "c_attn.weight" in stored.name:
            values = numpy_helper.to_array(stored) * np.float32(3e6)
            stored.CopyFrom(numpy_helper.from_array(values, stored.name))
    onnx.save(model, source / GRAPH)
    for overflow in ("refuse", "keep"):
        with pytest.raises(UnsupportedModelError, match="caches overflow in fp16") as caught:
            convert_decoder(source, tmp_path / "out", "fp16", texts("tiny_gpt2"), overflow=overflow, limit=LOOSE)
        assert "bf16" in str(caught.value) and "keep" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_decoder_that_is_not_its_twin_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"in s30\.fp16/model\.onnx"):
        convert_decoder(
            folder("tiny_llama", "uneven"),
            tmp_path / "s30.fp16",
            "fp16",
            texts("tiny_llama"),
            limit=Limit(1e-9, 0.0, 0.1),
        )


def test_what_is_no_fp32_decoder_or_no_text_is_refused(tmp_path: Path) -> None:
    source = folder("tiny_llama", "uneven")
    convert_decoder(source, tmp_path / "bf16", "bf16", texts("tiny_llama"), limit=LOOSE)
    with pytest.raises(UsageError, match="only fp32 files are converted"):
        convert_decoder(tmp_path / "bf16", tmp_path / "out", "fp16", texts("tiny_llama"))
    with pytest.raises(UsageError, match="calibrated on texts"):
        convert_decoder(source, tmp_path / "out", "fp16", [{"input_ids": np.zeros((1, 4), np.int64)}])
    with pytest.raises(UnavailableError, match="decoder"):
        convert_decoder(tmp_path / "nowhere", tmp_path / "out", "fp16", texts("tiny_llama"))
    with pytest.raises(UnavailableError, match="no kernels for bf16 on CPUs"):
        OnnxDecoder(tmp_path / "bf16" / GRAPH)
    (tmp_path / "bf16" / GRAPH).write_bytes(b"nothing")
    with pytest.raises(ArtifactError):
        OnnxDecoder(tmp_path / "bf16" / GRAPH)


def test_a_decoder_that_lost_every_attention_is_timed_in_steps_too(tmp_path: Path) -> None:
    from bench.inputs import graph_inputs
    from bench.timing import Cell, measure_cells

    files = {name: folder(name, "gone") / GRAPH for name in ("tiny_llama",)}
    bare = strip_caches(files["tiny_llama"], tmp_path / "bare.onnx")
    specs = {"dense": graph_inputs(files["tiny_llama"]), "bare": graph_inputs(bare)}
    cell = Cell.step(specs, 2, 7)
    assert set(cell.of("bare")) == {"input_ids", "attention_mask"}
    assert cell.of("bare")["attention_mask"].shape == (2, 8)
    assert cell.of("dense")["past_key_values.0.key"].shape[2] == 7
    (report,) = measure_cells(
        {"dense": files["tiny_llama"], "bare": bare}, [cell], seconds=0.01, sessions=1, rounds=2, calls=1
    )
    assert report.samples.sizes == {"batch": 2, "past": 7}
    with pytest.raises(UsageError, match="no decoders with a cache"):
        Cell.step({"dense": graph_inputs(files["tiny_llama"])[:1]}, 2, 7)


def strip_caches(file: Path, target: Path) -> Path:
    """A graph of the same tokens and mask that has no caches."""
    import onnx.helper as helper

    graph = onnx.load(file).graph
    node = helper.make_node("Cast", ["attention_mask"], ["logits"], to=1)
    out = helper.make_tensor_value_info("logits", 1, ["batch", "total_sequence"])
    bare = helper.make_graph(
        [node, helper.make_node("Identity", ["input_ids"], ["ids"])],
        "bare",
        list(graph.input[:2]),
        [out, helper.make_tensor_value_info("ids", 7, ["batch", "sequence"])],
    )
    onnx.save(helper.make_model(bare, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), target)
    return target


def test_an_fp16_decoder_writes_what_its_fp32_twin_writes(tmp_path: Path) -> None:
    source = folder("tiny_llama", "uneven")
    convert_decoder(source, tmp_path / "out", "fp16", texts("tiny_llama"), limit=LOOSE)
    prompts = [[5, 9, 4], [7]]
    ours, twin = (generate(OnnxDecoder(path / GRAPH), prompts, 8, stop=()) for path in (tmp_path / "out", source))
    assert ours == twin
