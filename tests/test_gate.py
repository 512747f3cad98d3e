"""Gate: every rule gives a verdict per member; what nobody measured breaks a rule; the exit code says it to CI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from figures import changed, judged, latency
from shipped import bundle_of

from deploy_prune.cli.main import run_command
from deploy_prune.errors import RecipeError, UsageError
from deploy_prune.release.gate import gate
from deploy_prune.release.gate_output import junit, markdown
from deploy_prune.release.limits import Limit, parse_limit
from deploy_prune.release.rules import Rules, RuleSet, load_rules

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bundle(tiny_vit, tmp_path):
    """s02 loses 2 of 100 hits, runs at 0.5 of dense's 4 ms on ort-cpu at batch 1 and at 0.9 at batch 8."""
    path = bundle_of(tiny_vit, tmp_path)
    dense, small = [1.0] * 80 + [0.0] * 20, [1.0] * 78 + [0.0] * 22
    cells = [latency(0.5, 0.45, 0.7), latency(0.9, 0.85, 0.95, batch=8)]
    return changed(
        path, dense=judged(path, "dense", dense), s02={**judged(path, "s02", small), "latency": cells, "audit": None}
    )


def outcomes(bundle, **rules):
    report = gate(bundle, Rules(rules=[RuleSet(verify=False, **rules)]))
    return {verdict.name: verdict.outcome for verdict in report.verdicts}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"max_drop": "0.02"}, {"max_drop": "passed"}),
        ({"max_drop": "0.019"}, {"max_drop": "failed"}),
        ({"max_drop": "3%"}, {"max_drop": "passed"}),
        ({"max_drop": "2%"}, {"max_drop": "failed"}),  # of 0.8, that is 0.016
        ({"max_drop": "0.03", "bound": "interval"}, {"max_drop": "failed"}),
        ({"max_p50_ms": 2.5, "batch": 1}, {"max_p50_ms (ort-cpu b1)": "passed"}),
        ({"max_p50_ms": 2.5}, {"max_p50_ms (ort-cpu b1)": "passed", "max_p50_ms (ort-cpu b8)": "failed"}),
        ({"max_p90_ms": 2.9, "batch": 1}, {"max_p90_ms (ort-cpu b1)": "failed"}),
        ({"min_speedup": 1.9, "batch": 1}, {"min_speedup (ort-cpu b1)": "passed"}),
        ({"min_speedup": 1.9, "batch": 1, "bound": "interval"}, {"min_speedup (ort-cpu b1)": "failed"}),
        ({"max_bytes": "100%"}, {"max_bytes": "passed"}),
        ({"max_bytes": 1000}, {"max_bytes": "failed"}),
        ({"max_macs": 1}, {"max_macs": "passed"}),
        ({"max_params": 0.5}, {"max_params": "failed"}),
        ({"max_parity": 1e-4}, {"max_parity": "passed"}),
        ({"max_parity": 1e-12}, {"max_parity": "failed"}),
        ({"require_runtime": ["ort-cpu"]}, {"require_runtime": "passed"}),
    ],
)
def test_every_rule_is_judged_by_its_figure(bundle, rules, expected):
    assert outcomes(bundle, **rules) == expected


@pytest.mark.parametrize(
    "rules",
    [
        {"max_macs": "50%"},  # this bundle states no costs of dense
        {"max_p50_ms": 3, "runtime": "ort-cuda"},
        {"max_p50_ms": 3, "sequence": 128},
        {"require_runtime": ["ort-cuda"]},
        {"audit": True},
    ],
)
def test_what_nobody_measured_fails_unless_it_is_allowed(bundle, rules):
    (rule,) = [name for name in rules if name not in ("runtime", "sequence")]
    assert list(outcomes(bundle, **rules).values()) == ["not measured"]
    assert list(outcomes(bundle, allow_unmeasured=[rule], **rules).values()) == ["allowed"]
    assert not gate(bundle, Rules(rules=[RuleSet(verify=False, **rules)])).passed
    assert gate(bundle, Rules(rules=[RuleSet(verify=False, allow_unmeasured=[rule], **rules)])).passed


def test_a_cell_whose_self_check_failed_counts_as_not_measured(bundle):
    changed(bundle, s02={"latency": [latency(0.5, 0.4, 0.6, trusted=False)]})
    assert outcomes(bundle, max_p50_ms=100) == {"max_p50_ms (ort-cpu b1)": "not measured"}


def test_an_audit_passes_or_fails_as_it_says(bundle):
    changed(bundle, s02={"audit": {"passed": True}})
    assert outcomes(bundle, audit=True) == {"audit": "passed"}
    changed(bundle, s02={"audit": {"passed": False, "problems": ["attention of layer 3 is not fused"]}})
    assert outcomes(bundle, audit=True) == {"audit": "failed"}


def test_rule_sets_choose_members_by_pattern_and_a_pattern_without_a_member_is_refused(bundle):
    report = gate(
        bundle,
        Rules(
            rules=[
                RuleSet(members=["*"], max_parity=1e-3, verify=False),
                RuleSet(members=["s0?"], max_bytes=1, verify=False),
            ]
        ),
    )
    assert [(v.member, v.rule, v.holds) for v in report.verdicts] == [
        ("dense", "max_parity", True),
        ("s02", "max_parity", True),
        ("s02", "max_bytes", False),
    ]
    with pytest.raises(UsageError, match=r"no member is called 's99'.*\n.*s02"):
        gate(bundle, Rules(rules=[RuleSet(members=["s99"], max_bytes=1)]))


def test_the_bundle_is_verified_first_and_damage_keeps_its_own_exit_code(bundle, capsys):
    assert run_command(["gate", str(bundle), "--max-drop", "5%"]) == 0
    assert "verify" in capsys.readouterr().out
    (bundle / "README.md").write_text("x")
    assert run_command(["gate", str(bundle), "--max-drop", "5%"]) == 4
    printed = capsys.readouterr()
    assert "README.md: has 1 bytes" in printed.err and "must not ship" in printed.out
    assert run_command(["gate", str(bundle), "--max-drop", "5%", "--no-verify"]) == 0


def test_rules_file_and_flags_hold_together(bundle, tmp_path, capsys):
    file = tmp_path / "gate.yaml"
    file.write_text("rules:\n  - {members: [s02], max_drop: 3%}\n  - {runtime: ort-cpu, batch: 8, min_speedup: 1.1}\n")
    arguments = ["gate", str(bundle), "--rules", str(file), "--no-verify"]
    assert run_command(arguments) == 0
    assert run_command([*arguments, "--max-bytes", "10"]) == 1
    captured = capsys.readouterr()
    assert "GateError: 1 of 3 rules broken in tiny\n  s02: max_bytes failed" in captured.err


def test_every_mistake_in_a_rules_file_is_listed(tmp_path):
    file = tmp_path / "gate.yaml"
    file.write_text(
        "rules:\n  - {max_drop: much, max_p50: 3}\n  - {batch: 8, max_bytes: 1}\n  - {}\n"
        "  - {max_bytes: 1, allow_unmeasured: [x]}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_rules(file)
    text = str(caught.value)
    for words in (
        "got 'much'",
        "max_p50: unknown key. Did you mean 'max_p50_ms'",
        "[1]: selects latency cells but has none",
        "rules[2]: asks for nothing",
        "rules[3].allow_unmeasured[0]",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("written", "limit"),
    [
        (3, Limit(3.0)),
        ("1%", Limit(0.01, True)),
        ("20MB", Limit(2e7)),
        ("1.5MiB", Limit(1.5 * 2**20)),
        ("1.2G", Limit(1.2e9)),
        (".5 %", Limit(0.005, True)),
        (1e-4, Limit(1e-4)),
    ],
)
def test_limits_are_read_as_people_write_them(written, limit):
    found = parse_limit(written)
    assert (found.value, found.of_dense) == (pytest.approx(limit.value), limit.of_dense)


@pytest.mark.parametrize("written", ["", "many", "3 apples", "1e99", None, True, [1], "nan", "inf", "1%%"])
def test_other_limits_are_refused(written):
    with pytest.raises(ValueError, match="expected"):
        parse_limit(written)


def test_junit_has_a_case_per_verdict_and_survives_any_text(bundle):
    changed(bundle, s02={"audit": {"passed": False, "problems": ["<&> \x00 \x1b[31m"]}})
    rules = RuleSet(
        max_bytes=1, max_parity=1, audit=True, require_runtime=["ort-cuda"], allow_unmeasured=["require_runtime"]
    )
    report = gate(bundle, Rules(rules=[rules]))
    suite = ElementTree.fromstring(junit(report)).find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("5", "2", "1")
    cases = {
        case.get("name"): [child.tag for child in case if child.tag != "system-out"] for case in suite.iter("testcase")
    }
    assert cases == {
        "verify": [], "max_bytes": ["failure"], "max_parity": [], "audit": ["failure"], "require_runtime": ["skipped"],
    }  # fmt: skip


def test_markdown_goes_to_its_file_and_to_the_summary_of_a_github_job(bundle, tmp_path, monkeypatch):
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    code = run_command(
        ["gate", str(bundle), "--max-bytes", "1", "--no-verify", "--markdown", str(tmp_path / "gate.md"),
         "--junit", str(tmp_path / "gate.xml")]
    )  # fmt: skip
    assert code == 1
    text = (tmp_path / "gate.md").read_text()
    assert "## tiny: 1 of 1 rules broken" in text and "| **failed** | s02 | max_bytes |" in text
    assert summary.read_text() == "before\n" + text
    assert (tmp_path / "gate.xml").exists()


def test_a_pipe_in_a_figure_does_not_break_the_markdown_table(bundle):
    changed(bundle, s02={"audit": {"passed": False, "problems": ["a|b"]}})
    text = markdown(gate(bundle, Rules(rules=[RuleSet(audit=True, verify=False)])))
    assert "a\\|b" in text


_NO_TORCH = """
import sys
sys.modules["torch"] = None  # importing it now fails
from deploy_prune.cli.main import run_command
sys.exit(run_command(["gate", sys.argv[1], "--max-drop", "5%", "--bound", "interval", "--json"]))
"""


def test_gate_needs_no_torch_and_prints_json(bundle):
    done = subprocess.run(
        [sys.executable, "-c", _NO_TORCH, str(bundle)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert not found["passed"] and {v["rule"] for v in found["verdicts"]} == {"verify", "max_drop"}
