"""Where base weights and data come from and under which licence: as the recipe says, else as their own files do.

Nothing is looked up on the network and nothing is guessed; what neither says is None, and is called unknown.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy_prune.references import Reference, data_reference, local_path, model_reference

_LONGEST = 300  # characters of a licence or source that a file states; more is no name of one
# What the Hugging Face Hub takes as `license:` in a card's metadata (hub docs, "Licenses"); anything else is `other`.
_HUB_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl apple-ascl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa
unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other
"""
HUB_LICENSES = frozenset(_HUB_LICENSES.split())


@dataclass(frozen=True)
class Origin:
    """`Origin("apache-2.0", "https://huggingface.co/timm/...", "timm's configuration of the weights")`."""

    license: str | None = None
    source: str | None = None
    stated_by: str | None = None


_DEMO = Origin("apache-2.0", "trained by the run itself", "deploy-prune")
_DIGITS = Origin(
    "cc-by-4.0",
    "Optical Recognition of Handwritten Digits, UCI, https://doi.org/10.24432/C50P49, in scikit-learn",
    "deploy-prune",
)


def model_origin(ref: str, license: str | None = None, source: str | None = None) -> Origin:
    """The origin of a model reference's weights; what the recipe gives goes before what files say."""
    reference = model_reference(ref)
    found = {"timm": _timm, "hf": _hf, "gguf": _gguf, "python": _python}[reference.scheme](reference)
    return _merged(license, source, found)


def data_origin(ref: str, license: str | None = None, source: str | None = None) -> Origin:
    """The origin of a data reference: a directory's card, or the name on the hub."""
    reference = data_reference(ref)
    found = _DIGITS if reference.scheme == "digits" else Origin()
    if reference.scheme != "digits":
        path = local_path(reference.location)
        if path.is_dir():
            found = _card(path)
        elif reference.scheme == "hf":
            found = Origin(source=f"https://huggingface.co/datasets/{reference.location.partition(':')[0]}",
                           stated_by="the reference")  # fmt: skip
    return _merged(license, source, found)


def _merged(license: str | None, source: str | None, found: Origin) -> Origin:
    if license is None and source is None:
        return found
    by = ["the recipe"]
    if found.stated_by and ((license is None and found.license) or (source is None and found.source)):
        by.append(found.stated_by)
    return Origin(license or found.license, source or found.source, " and ".join(by))


def _timm(reference: Reference) -> Origin:
    """A file says it in its metadata; timm says it of the weights it fetches itself, and of no others."""
    if reference.file is not None:
        return _safetensors(local_path(reference.file))
    import timm

    config = timm.get_pretrained_cfg(reference.location)
    if config is None:
        return Origin()
    hub = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else None
    return _stated(config.license, hub or config.origin_url, "timm's configuration of the weights")


def _python(reference: Reference) -> Origin:
    return _DEMO if reference.location.startswith("deploy_prune.demo:") else Origin()


def _hf(reference: Reference) -> Origin:
    path = local_path(reference.location)
    if not path.is_dir():  # on the hub: its card is not among the files that are fetched
        return Origin(source=f"https://huggingface.co/{reference.location}", stated_by="the reference")
    config = _json(path / "config.json")
    found = [_card(path), _stated(config.get("license"), None, "config.json"), _safetensors(path / "model.safetensors")]
    return next((origin for origin in found if origin.license), next((o for o in found if o.source), Origin()))


def _gguf(reference: Reference) -> Origin:
    import gguf

    fields = gguf.GGUFReader(local_path(reference.location)).fields
    said = {name: field.contents() for name, field in fields.items() if name.startswith("general.")}
    source = said.get("general.source.url") or said.get("general.source.huggingface.repository")
    return _stated(said.get("general.license"), source, "the GGUF file's metadata")


def _safetensors(path: Path) -> Origin:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            said = file.metadata() or {}
    except (OSError, SafetensorError):  # weights in several files, or none: whoever loads the model says more
        return Origin()
    return _stated(said.get("license"), said.get("source") or said.get("base_model"), f"the metadata of {path.name}")


def _card(directory: Path) -> Origin:
    """What the YAML head of a directory's README.md says, as the Hugging Face Hub reads it."""
    import yaml

    try:
        text = (directory / "README.md").read_text(encoding="utf-8")
        head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        said = yaml.safe_load(head[1]) if head and len(head[1]) < 100_000 else None
    except (OSError, ValueError, yaml.YAMLError):
        return Origin()
    if not isinstance(said, dict):
        return Origin()
    named = said.get("license_name") if said.get("license") == "other" else said.get("license")
    return _stated(named, said.get("base_model") or said.get("source_datasets"), f"the card of {directory.name}")


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _stated(license: object, source: object, by: str) -> Origin:
    said = [value[0] if isinstance(value, list) and value else value for value in (license, source)]
    names = [value.strip() if isinstance(value, str) and 0 < len(value.strip()) <= _LONGEST else None for value in said]
    known = names[0] if names[0] and names[0].lower() not in ("unknown", "other") else None
    return Origin(known, names[1], by if known or names[1] else None)
