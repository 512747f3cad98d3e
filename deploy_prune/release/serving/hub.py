"""A bundle on the Hugging Face Hub: checked first, then uploaded as it is, with its card and report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deploy_prune.errors import ArtifactError, UnavailableError, UsageError
from deploy_prune.progress import SILENT, Progress


@dataclass(frozen=True)
class Push:
    """What goes where: `files` are (name, bytes) in `repo`; `url` is where it went, None for a dry run."""

    repo: str
    files: tuple[tuple[str, int], ...]
    url: str | None = None


def push(
    bundle: Path | str,
    repo: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    progress: Progress = SILENT,
    note: Callable[[str], None] = lambda text: None,
) -> Push:
    """Verify a bundle, check its card as the Hub reads it, and upload it; with `dry_run` all but the upload.

    The token is the one huggingface_hub finds (HF_TOKEN, `hf auth login`); it is never stored or printed. Raises
    UsageError for an impossible repository name, the errors of `verify`, UnavailableError when the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from deploy_prune.release.bundle import walk
    from deploy_prune.release.verify import verify

    bundle = Path(bundle)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError("not a repository name", expected="OWNER/NAME", got=str(error)[:200]) from error
    verify(bundle, progress=progress)
    check_card(bundle)
    files = tuple((name, path.stat().st_size) for name, path in walk(bundle))
    if dry_run:
        return Push(repo, files)
    try:
        api = HfApi()
        created = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=bundle, commit_message=f"deploy-prune: {bundle.name}")
    except Exception as error:  # HTTP errors, no network, offline mode: they have no common class
        raise UnavailableError(
            "the Hub did not take the bundle",
            where=repo,
            got=str(error).strip()[:400],
            remedy="Log in (`hf auth login` or HF_TOKEN), and unset HF_HUB_OFFLINE; --dry-run checks without the Hub.",
        ) from error
    note(f"uploaded {len(files)} files")
    return Push(repo, files, f"https://huggingface.co/{created.repo_id}")


def check_card(bundle: Path) -> None:
    """Raise ArtifactError when README.md has no metadata that huggingface_hub reads."""
    from huggingface_hub import ModelCard

    file = bundle / "README.md"
    try:
        data = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=False).data.to_dict()
    except Exception as error:  # YAML or a model index of another form: whatever the library stumbles over
        raise ArtifactError("the card has no valid metadata", where=str(file), got=str(error)[:300]) from error
    if data.get("library_name") != "onnx":
        raise ArtifactError(
            "the card has no metadata", where=str(file), expected="library_name: onnx", got=str(data)[:200]
        )
