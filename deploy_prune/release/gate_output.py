"""A gate's verdicts for machines and people: JUnit XML for CI, Markdown for a job summary."""

from __future__ import annotations

import os
from pathlib import Path

from deploy_prune.errors import UnavailableError
from deploy_prune.files import atomic_file
from deploy_prune.release.gate import GateReport, Verdict

SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"


def junit(report: GateReport) -> str:
    """One test suite, a test case per verdict: broken rules are failures, allowed gaps are skipped."""
    from xml.etree import ElementTree as xml

    suites = xml.Element("testsuites", name="deploy-prune gate")
    suite = xml.SubElement(
        suites,
        "testsuite",
        name=_clean(f"gate {report.bundle}"),
        tests=str(len(report.verdicts)),
        failures=str(len(report.failures)),
        errors="0",
        skipped=str(sum(verdict.outcome == "allowed" for verdict in report.verdicts)),
    )
    properties = xml.SubElement(suite, "properties")
    xml.SubElement(properties, "property", name="manifest_sha256", value=report.manifest_sha256)
    for verdict in report.verdicts:
        case = xml.SubElement(
            suite, "testcase", classname=_clean(f"{report.bundle}.{verdict.member}"), name=_clean(verdict.name)
        )
        if verdict.outcome == "allowed":
            xml.SubElement(case, "skipped", message=_clean(f"not measured: {verdict.reason}"))
        elif not verdict.holds:
            failure = xml.SubElement(case, "failure", type=verdict.outcome, message=_clean(sentence(verdict)))
            failure.text = _clean(verdict.reason)
        xml.SubElement(case, "system-out").text = _clean(sentence(verdict))
    xml.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + xml.tostring(suites, encoding="unicode") + "\n"


def markdown(report: GateReport) -> str:
    """A heading that says whether the bundle may ship, and a table of the verdicts, broken ones first."""
    broken, total = len(report.failures), len(report.verdicts)
    lines = [
        f"## {_cell(report.bundle)}: " + ("may ship" if report.passed else f"{broken} of {total} rules broken"),
        "",
        "| | member | rule | figure | limit | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for verdict in sorted(report.verdicts, key=lambda v: v.holds):
        mark = verdict.outcome if verdict.holds else f"**{verdict.outcome}**"
        cells = (mark, verdict.member, verdict.name, verdict.figure, verdict.limit, verdict.reason.splitlines()[:1])
        lines.append(
            "| " + " | ".join(_cell(c[0] if c else "") if isinstance(c, list) else _cell(c) for c in cells) + " |"
        )
    return "\n".join([*lines, "", f"Manifest `{report.manifest_sha256}`.", ""])


def sentence(verdict: Verdict) -> str:
    """`s50: max_p50_ms (ort-cpu b8) failed: 3.4, limit 3 ms`."""
    found = verdict.reason.splitlines()[0] if verdict.figure == "–" and verdict.reason else verdict.figure
    return f"{verdict.member}: {verdict.name} {verdict.outcome}: {found}, limit {verdict.limit}"


def write(path: Path, text: str) -> None:
    """Write a report file, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_job_summary(report: GateReport) -> None:
    """Add the Markdown to the page of a running GitHub job; nothing outside one."""
    target = os.environ.get(SUMMARY_VARIABLE)
    if not target:
        return
    try:
        with open(target, "a", encoding="utf-8") as stream:
            stream.write(markdown(report))
    except OSError as error:
        raise UnavailableError(
            f"cannot write the job summary ({error.strerror})", where=target, remedy=f"Unset {SUMMARY_VARIABLE}."
        ) from error


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _clean(text: str) -> str:
    """Without the control characters that XML 1.0 has no way to write."""
    return "".join(
        c for c in text if c in "\t\n\r" or " " <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" or c > "\uffff"
    )
