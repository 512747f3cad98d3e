"""A member's decoder in a bundle: its graph, and its stored tokens read again in pieces. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from deploy_prune.errors import ArtifactError
from deploy_prune.release.answers import MemberCheck, compared
from deploy_prune.release.graphs import graph_problems
from deploy_prune.release.manifest import DecoderEntry, Manifest

if TYPE_CHECKING:
    import numpy as np


def check_decoder(
    bundle: Path, manifest: Manifest, name: str, decoder: DecoderEntry
) -> tuple[list[str], list[str], list[MemberCheck]]:
    """(what is wrong with the file, where its answers differ, its figures), by onnxruntime on the CPU.

    Every piece of the stored tokens is read on the caches that the graph gave back for the pieces before it.
    """
    from converters.generation import OnnxDecoder, replay

    problems = list(graph_problems(bundle, manifest, decoder, decoder.inputs, decoder.outputs))
    if problems:
        return problems, [], []
    try:
        graph = OnnxDecoder(bundle / decoder.file)

        def answer(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
            return replay(graph, inputs["input_ids"], inputs["attention_mask"], inputs["chunks"].tolist())

        check, differences = compared(
            bundle, f"{name}, decoding", decoder.samples, answer, lambda inputs: inputs["attention_mask"]
        )
    except ArtifactError as error:
        return [f"{error.what}: {error.got}"], [], []
    except KeyError as error:
        return [f"{decoder.samples.file} lacks {error}"], [], []
    return [], differences, [check]
