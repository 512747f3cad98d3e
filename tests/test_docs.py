"""The documentation builds offline with every link checked, and its commands are ones the command line knows."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from commands import PAGES, ROOT, commands

from deploy_prune.cli.main import cli

SHOWN = [
    pytest.param(line, id=f"{page.name}:{line[13:60]}")
    for page in PAGES
    for line in commands(page)
    if line.startswith("deploy-prune ")
]


@pytest.mark.parametrize("line", SHOWN)
def test_commands_of_the_documentation_are_understood(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    command: click.Command = cli
    context = cli.make_context("deploy-prune", list(words), resilient_parsing=True)
    while isinstance(command, click.Group):
        while words and words[0].startswith("-"):
            words.pop(0)  # options of the program itself
        found = command.get_command(context, words[0]) if words else None
        assert found is not None, f"no command {words[:1]} in: {line}"
        command, words = found, words[1:]
    try:
        command.make_context(command.name or "", words)
    except click.exceptions.Exit:
        pass  # --help, --schema
    except click.BadParameter as error:
        assert "does not exist" in error.format_message(), error.format_message()


def test_site_builds_with_every_link_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= len(PAGES) - 1
    for page in pages:
        fetched = re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"?(https?://[^\" >]+)", page.read_text())
        assert not fetched, f"{page.name} fetches {fetched}"
    formulas = (tmp_path / "methods/searches.html").read_text()
    assert "<math" in formulas and "$`" not in formulas
    keys = (tmp_path / "reference/recipe.html").read_text()
    assert "emphasis" in keys and "until" in keys
    names = (tmp_path / "reference/python.html").read_text()
    assert "deploy_prune.methods.search" in names and "collect_moments" in names
    assert "--until-resolved" in (tmp_path / "reference/cli.html").read_text()
