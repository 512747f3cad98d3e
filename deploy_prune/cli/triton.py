"""`deploy-prune triton`: a model repository for Triton Inference Server."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Write a Triton model repository from a bundle.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Directory of the repository.")
@click.option("--member", "members", multiple=True, metavar="NAME", help="Only this member.  [default: all]")
@click.option("--gpu", is_flag=True, help="Run on GPUs; on CPUs otherwise.")
@click.option("--max-batch", default=32, show_default=True, help="Largest batch the server forms; 0: none.")
@click.option("--delay-us", default=500, show_default=True, help="How long a request waits for others.")
def command(bundle: Path, out: Path, members: tuple[str, ...], gpu: bool, max_batch: int, delay_us: int) -> None:
    """Write OUT/NAME/1/model.onnx and OUT/NAME/config.pbtxt for the members of BUNDLE, with dynamic batching."""
    from deploy_prune.cli import console
    from deploy_prune.release.serving.triton import write_repository

    names = write_repository(bundle, out, members=members, gpu=gpu, max_batch=max_batch, delay_us=delay_us)
    console.note(f"wrote {out}: {', '.join(names)} (tritonserver --model-repository={out})")
