"""A GGUF file becomes an ordinary model folder (fp32 safetensors, config, tokenizer), once per file and version.

Dequantising takes many seconds, so the folder is kept in the user's cache.
"""

from __future__ import annotations

import logging
from pathlib import Path

from deploy_prune.cache import cache_root
from deploy_prune.errors import ArtifactError, UnavailableError
from deploy_prune.files import atomic_dir, existing, sha256_file

log = logging.getLogger(__name__)
_MAGIC = b"GGUF"


def dequantised(file: Path) -> Path:
    """The model folder made of a GGUF `file`; made now if it is not in the cache.

    Raises UnavailableError when the file or the `gguf` package is missing, ArtifactError when it is not GGUF or
    cannot be read as one.
    """
    folder = cached_folder(file)
    if (folder / "config.json").is_file():
        return folder
    log.warning("Dequantising %s to float32; this happens once and is kept in %s", file.name, folder)
    with atomic_dir(folder) as temporary:
        _convert(file, temporary)
    return folder


def cached_folder(file: Path) -> Path:
    """Where the folder of `file` lies or would lie: the key holds the file's bytes and both readers' versions."""
    with open(existing(file, "GGUF file"), "rb") as stream:
        magic = stream.read(4)
    if magic != _MAGIC:
        raise ArtifactError(
            "not a GGUF file", where=str(file), expected="the first four bytes to be 'GGUF'", got=repr(magic)
        )
    return cache_root() / "gguf" / f"{sha256_file(file)[:32]}-{_versions()}"


def _versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"transformers{version('transformers')}-gguf{version('gguf')}"
    except PackageNotFoundError as error:
        raise UnavailableError(
            "reading GGUF files needs a package that is not installed",
            got=str(error),
            remedy="Install it: pip install gguf",
        ) from error


def _convert(file: Path, folder: Path) -> None:
    import struct

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError, IndexError, TypeError, struct.error, RuntimeError) as error:
        raise ArtifactError(
            "cannot read this GGUF file",
            where=str(file),
            got=f"{type(error).__name__}: {error}"[:300],
            remedy="It is damaged, or of an architecture that transformers cannot read from GGUF; "
            "copy it again or use the model's safetensors form.",
        ) from error
    # The weights are plain floats now, but a model that came from GGUF refuses to be saved: move them to a fresh one.
    settings = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    plain = type(model)(type(model.config).from_dict(settings))
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
