"""`deploy-prune generate`: what an exported decoder writes, computed by onnxruntime alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import click

from deploy_prune.cli import console
from deploy_prune.errors import ArtifactError, UsageError, did_you_mean
from deploy_prune.files import existing, sha256_file


@click.command(short_help="Write on from a prompt with a decoder of a bundle, by onnxruntime alone.")
@click.argument("thing", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, required=True, help="Text to go on from; several are one batch.")
@click.option("--member", help="Member of the bundle.  [default: the only one]")
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens to make at most.")
@click.option("--no-stop", is_flag=True, help="Go on after the token that ends a text.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="tokenizer.json  [default: beside the graph]")
@click.option("--threads", type=click.IntRange(1), help="Threads of onnxruntime.  [default: its own choice]")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where onnxruntime computes."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    thing: Path,
    prompts: tuple[str, ...],
    member: str | None,
    tokens: int,
    no_stop: bool,
    tokenizer: Path | None,
    threads: int | None,
    device: Literal["cpu", "cuda"],
    as_json: bool,
) -> None:
    """Write on greedily from every prompt. THING is a bundle made with `export.cache: true`, one of its decoders/NAME
    directories, or a decoder's ONNX file. Neither torch nor transformers is used.
    """
    from converters.generation import OnnxDecoder, Text, generate

    file = _graph(thing, member)
    text = Text(tokenizer or file.parent / "tokenizer.json")
    decoder = OnnxDecoder(file, threads=threads, device=device)
    given = [text.ids(prompt) for prompt in prompts]
    started = time.monotonic()
    made = generate(decoder, given, tokens, stop=() if no_stop else None)
    seconds = time.monotonic() - started
    if as_json:
        lines = [
            {"prompt": prompt, "prompt_tokens": ids, "tokens": new, "text": text.text(new)}
            for prompt, ids, new in zip(prompts, given, made, strict=True)
        ]
        console.emit_json({"file": str(file), "seconds": seconds, "texts": lines})
        return
    for prompt, new in zip(prompts, made, strict=True):
        print(prompt + text.text(new))
    steps = max(map(len, made))
    console.note(f"{steps} tokens in {console.duration(seconds)}, with prefill ({steps / seconds:.1f} a second)")


def _graph(thing: Path, member: str | None) -> Path:
    """The ONNX file that is meant. Of a bundle it must still be the one that the manifest hashes."""
    from deploy_prune.release.manifest import MANIFEST, Manifest

    existing(thing, "bundle or decoder")
    if not (thing / MANIFEST).is_file():
        if member is not None:
            raise UsageError("--member chooses among the members of a bundle", got=str(thing))
        return thing / "model.onnx" if thing.is_dir() else thing
    manifest = Manifest.load(thing / MANIFEST)
    decoders = {m.name: m.decoder for m in manifest.members if m.decoder is not None}
    if not decoders:
        raise UsageError(
            "the bundle holds no decoder with a key/value cache",
            where=str(thing),
            remedy="Make it again with --set export.cache=true.",
        )
    if member is None and len(decoders) > 1:
        raise UsageError("which member?", expected=f"--member with one of {', '.join(decoders)}")
    chosen = decoders.get(member or next(iter(decoders)))
    if chosen is None:
        raise UsageError(f"no decoder of a member {member!r}", remedy=did_you_mean(member or "", list(decoders)))
    for name in chosen.named_files():
        if sha256_file(existing(thing / name)) != manifest.files[name].sha256:
            raise ArtifactError("not the file that was made", where=name, remedy="`deploy-prune verify` says more.")
    return thing / chosen.file
