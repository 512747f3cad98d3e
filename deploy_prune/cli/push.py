"""`deploy-prune push`: a bundle goes to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Upload a bundle to the Hugging Face Hub.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--public", is_flag=True, help="Create the repository for everybody to see.  [default: private]")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be uploaded.")
def command(bundle: Path, repo: str, public: bool, dry_run: bool) -> None:
    """Verify BUNDLE, check its model card, and upload it to REPO (OWNER/NAME). The token is huggingface_hub's own:
    HF_TOKEN, or that of `hf auth login`."""
    from deploy_prune.cli import console
    from deploy_prune.release.serving.hub import push

    done = push(bundle, repo, private=not public, dry_run=dry_run, progress=console.progress(), note=console.note)
    total = sum(size for _, size in done.files)
    if done.url is None:
        console.table(["file", "bytes"], [[name, f"{size:,}"] for name, size in done.files])
    console.note(
        f"{len(done.files)} files, {total / 2**20:.1f} MiB -> {done.url or done.repo + ' (dry run: nothing was sent)'}"
    )
