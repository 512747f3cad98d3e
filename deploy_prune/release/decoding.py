"""A member's decoder in a bundle: its graph, and its stored tokens read again in pieces. No torch."""

from __future__ import annotations

from pathlib import Path

from deploy_prune.errors import ArtifactError
from deploy_prune.release.answers import PLAIN, MemberCheck, compared
from deploy_prune.release.graphs import graph_problems
from deploy_prune.release.manifest import DecoderEntry, Manifest, Member


def check_decoder(
    bundle: Path, manifest: Manifest, member: Member, decoder: DecoderEntry
) -> tuple[list[str], list[str], list[MemberCheck]]:
    """(what is wrong with the file, where its answers differ, its figures), by onnxruntime on the CPU.

    Every piece of the stored tokens is read on the caches that the graph gave back for the pieces before it.
    """
    from converters.generation import COUNTED
    from converters.precision.decoders import replayed
    from converters.precision.formats import HALF

    problems = list(graph_problems(bundle, manifest, decoder, decoder.inputs, decoder.outputs, member.precision))
    if problems:
        return problems, [], []
    try:
        check, differences = compared(
            bundle,
            f"{member.name}, decoding",
            decoder.samples,
            replayed(bundle / decoder.file, member.precision),
            lambda inputs: inputs.get(COUNTED, inputs["attention_mask"]),
            runtime=f"{PLAIN}, {member.precision} emulated" if member.precision in HALF else PLAIN,
        )
    except ArtifactError as error:
        return [f"{error.what}: {error.got}"], [], []
    except KeyError as error:
        return [f"{decoder.samples.file} lacks {error}"], [], []
    return [], differences, [check]
