"""Where deploy-prune keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """$XDG_CACHE_HOME/deploy-prune or ~/.cache/deploy-prune: dequantised GGUF files, latency tables, the demo model."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "deploy-prune"
