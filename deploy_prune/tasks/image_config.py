"""What a transformers model folder says about its images, in timm's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy_prune.errors import UsageError
from deploy_prune.files import read_json

FILE = "preprocessor_config.json"
# The numbers that PIL, and so transformers' image processors, give to its filters.
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def folder_images(folder: Path) -> dict[str, Any]:
    """`mean`, `std`, `interpolation`, `crop_pct` and `crop_mode` as `preprocessor_config.json` describes them; empty
    when there is no such file.

    Raises UsageError for steps that are not resize, centre crop, scale to [0, 1] and normalise.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    found = read_json(path)
    found = found.get("image_processor", found)
    problems = []
    if not found.get("do_resize", True):
        problems.append("do_resize is false")
    if not found.get("do_rescale", True) or abs(float(found.get("rescale_factor", 1 / 255)) * 255 - 1) > 1e-6:
        problems.append("values are not scaled from bytes to [0, 1]")
    if "crop_pct" in found or "size_divisor" in found:
        problems.append("a resize that depends on crop_pct or size_divisor")
    size, crop = found.get("size"), found.get("crop_size")
    resized, mode = _resized(size)
    if resized is None:
        problems.append(f"size is {size!r}, expected shortest_edge or height and width")
    wanted, _ = _resized(crop) if found.get("do_center_crop", crop is not None) else (resized, mode)
    if wanted is None:
        problems.append(f"crop_size is {crop!r}, expected height and width")
    elif resized is not None and wanted > resized:
        problems.append(f"a crop of {wanted} out of {resized}")
    resample = found.get("resample", 2)
    if resample not in _FILTERS:
        problems.append(f"resample is {resample!r}, expected one of {sorted(_FILTERS)}")
    if problems or resized is None or wanted is None:
        raise UsageError(
            "images are prepared in a way that is not supported",
            where=str(path),
            problems=problems,
            remedy="Give the task options image_size, mean, std, interpolation and crop_pct.",
        )
    plain = not found.get("do_normalize", True)
    return {
        "mean": [0.0] * 3 if plain else found["image_mean"],
        "std": [1.0] * 3 if plain else found["image_std"],
        "interpolation": _FILTERS[resample],
        "crop_pct": wanted / resized,
        "crop_mode": mode,
    }


def _resized(size: Any) -> tuple[int | None, str]:
    """The edge of a square size, and how timm calls the way to get there; (None, ...) for anything else."""
    if isinstance(size, int):
        return size, "center"
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        return int(size["shortest_edge"]), "center"
    if isinstance(size, dict) and size.get("height") and size.get("height") == size.get("width"):
        return int(size["height"]), "squash"
    return None, "center"
