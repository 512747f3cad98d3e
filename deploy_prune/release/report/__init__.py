"""The report: a bundle on one page that opens offline, and the same pictures as PNG."""

from __future__ import annotations

from deploy_prune.release.report.page import report_html, write_report

__all__ = ["report_html", "write_report"]
