"""The code blocks of README and docs: what a reader would paste, in reading order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, *DOCS]
SHELL = ("", "bash", "sh", "console")
STARTS = ("deploy-prune ", "pip ", "make ", "openssl ", "accelerate ", "torchrun ")


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The page's fenced blocks in one of these languages, "" being none."""
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        if language in languages:
            yield code


def commands(page: Path) -> Iterator[str]:
    """Every command of the page's shell blocks, continued lines joined."""
    for block in blocks(page, *SHELL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(STARTS):
                yield line
