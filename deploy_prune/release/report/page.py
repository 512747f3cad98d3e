"""The report as one HTML file: data, style and script inside, nothing fetched, no other library.

Its policy (Content-Security-Policy) forbids the browser to load anything at all, so that it opens offline and tells
nobody that it was read.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import ArtifactError
from deploy_prune.files import atomic_file, existing
from deploy_prune.release.report.figures import figures
from deploy_prune.release.report.loading import loading

if TYPE_CHECKING:
    from deploy_prune.release.manifest import Manifest

_HERE = Path(__file__).parent


def report_html(bundle: Path, manifest: Manifest) -> str:
    """The page of a bundle whose files are in place; the same bundle is always the same page."""
    data = figures(bundle, manifest)
    return _filled({**data, "loading": loading(manifest)})


def write_report(bundle: Path | str, out: Path | str) -> Path:
    """Write the page of a finished bundle to `out`. Raises UnavailableError or ArtifactError for what is no bundle."""
    from deploy_prune.release.manifest import MANIFEST, Manifest

    bundle, out = existing(bundle, "bundle"), Path(out)
    if not bundle.is_dir():
        raise ArtifactError("not a bundle", where=str(bundle), expected="a directory", got="a file")
    text = report_html(bundle, Manifest.load(bundle / MANIFEST))
    with atomic_file(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return out


def _filled(data: dict[str, Any]) -> str:
    # "<" could end the script element; the line separators are line ends to JavaScript, not to JSON
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
    for character in "<\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    page = (_HERE / "report.html").read_text(encoding="utf-8")
    for mark, content in (
        ("/*STYLE*/", (_HERE / "report.css").read_text(encoding="utf-8")),
        ("/*SCRIPT*/", (_HERE / "report.js").read_text(encoding="utf-8")),
        ("<!--TITLE-->", html.escape(str(data["name"]))),
        ("/*DATA*/", text),
    ):
        page = page.replace(mark, content)
    return page
