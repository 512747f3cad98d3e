"""The race's tables and plots, from its JSON files alone.

python -m bench.studies.race_report bench/results/race_*.json          # Markdown, and a PNG beside each file
python -m bench.studies.race_report bench/results/race_*.json --docs   # also the tables in docs/ and README.md
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bench.studies.contestants import contestants
from bench.studies.race_analysis import (
    Apart,
    Difference,
    Point,
    Summary,
    apart,
    best_throughout,
    lost,
    points,
    sizes_of,
    sound,
    summary,
)
from bench.studies.race_plot import plot
from bench.studies.race_result import DENSE, RaceResult, key_of
from deploy_prune.errors import UsageError

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- race: made by bench.studies.race_report -->", "<!-- end of race -->"
FORM_NAMES = {"own": "as published", "refit": "all kinds, our refit", "recovered": "recovered"}
NONE_YET = "No race has been run with this version yet."


@click.command(help=__doc__)
@click.argument("files", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--docs", is_flag=True, help="Write the sections of docs/performance.md and README.md too.")
@click.option("--plots/--no-plots", default=True, show_default=True)
def main(files: tuple[Path, ...], docs: bool, plots: bool) -> None:
    results = [RaceResult.load(file) for file in files]
    for result in results:
        click.echo(full(result))
        if plots:
            plot(result, result.path.with_suffix(".png"))
    if docs:
        for target, body in pages(results).items():
            target.write_text(with_section(target.read_text(encoding="utf-8"), body), encoding="utf-8")


def pages(results: Sequence[RaceResult]) -> dict[Path, str]:
    """The files that repeat what races found, and what stands between their markers."""
    return {ROOT / "docs/performance.md": section(results), ROOT / "README.md": in_short(results)}


def full(result: RaceResult) -> str:
    """Everything a race found, as Markdown: who kept how much at each size, the verdicts, and what was left out."""
    head = result.head
    parts = [f"### {head['recipe']}", "", facts(result), "", *table(result), "", *verdicts(result)]
    if terms := training_of(result):
        parts += ["", f"After the same recovery, {terms}:", ""]
        parts += [*verdicts(result, "recovered"), *untrained(result), *trained_from(result)]
    parts += ["", *latencies(result)]
    for name, reason in head["not_supported"].items():
        parts.append(f"- {name} does not take part: {reason}.")
    return "\n".join(parts).rstrip() + "\n"


def section(results: Sequence[RaceResult]) -> str:
    """The verdicts of every race, and one line of summary each."""
    if not results:
        return NONE_YET
    parts: list[str] = []
    for title, result in titled(results).items():
        parts += [f"**{title}**: {facts(result)}", "", *verdicts(result), ""]
        if terms := training_of(result):
            parts += [f"The best few after the same short recovery, {terms}:", ""]
            parts += [*verdicts(result, "recovered"), *untrained(result), *trained_from(result), ""]
        parts += [f"{name} does not take part: {why}.\n" for name, why in left_out(result).items()]
    return "\n".join(parts).strip()


def training_of(result: RaceResult) -> str:
    """`50 steps, batch_size 2`; nothing where none was trained. Raises UsageError when rows were trained on other terms
    than each other."""
    found = {
        ", ".join([f"{row['steps']} steps", *(f"{key} {value}" for key, value in row.get("training", {}).items())])
        for row in result.rows.values()
        if row["form"] == "recovered"
    }
    if len(found) > 1:
        raise UsageError(
            "rows were trained on unlike terms",
            where=str(result.path),
            got="; ".join(sorted(found)),
            remedy="Train all of them again: the rows of one recovery replace those of another.",
        )
    return next(iter(found), "")


def trained_from(result: RaceResult) -> list[str]:
    """A sentence on sizes where ours was trained from a path that was not calibrated, as `path` of a row says."""
    sizes = [row["asked"] for row in result.rows.values() if row.get("path") == "as searched"]
    if not sizes:
        return []
    at = ", ".join(f"{asked:.0%}" for asked in sorted(sizes))
    return ["", f"Ours at {at} was trained from its path as searched, and not yet from the calibrated one."]


def untrained(result: RaceResult) -> list[str]:
    """A sentence on contestants that lose least of the others at a size and were not trained there."""
    trained = {(row["contestant"], row["asked"]) for row in result.rows.values() if row["form"] == "recovered"}
    sizes = {asked for _, asked in trained}
    best = {point.asked: point.other["contestant"] for point in points(result)}
    missing = {asked: name for asked, name in best.items() if asked in sizes and (name, asked) not in trained}
    if not missing:
        return []
    named = [
        f"{name} at {' and '.join(f'{asked:.0%}' for asked in missing if missing[asked] == name)}"
        for name in dict.fromkeys(missing.values())
    ]
    return ["", f"**Not trained**, though the best other without training: {', '.join(named)}."]


def in_short(results: Sequence[RaceResult]) -> str:
    """A line per model: ours and the best other at every size, and the share of its loss that ours loses."""
    if not results:
        return NONE_YET
    lines = [
        "| model, metric | others raced | dense | removed: ours (best other) "
        "| lost, of what is lost by the best other of each size | by the one best other | by the best as published |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, result in titled(results).items():
        found, head = points(result), result.head
        if not found:
            continue
        cells = [f"{p.asked:.0%}: {written(result, p.ours)} ({written(result, p.other)})" for p in found]
        over, one = summary(found), best_throughout(result)
        published = summary(points(result, ("own",), without=_our_refit()))
        share = f"{over.lost / one[2]:.2f}" if one is not None and one[2] > 0 else ""
        lines.append(
            f"| {title}, {head['metric']} | {_others(result)} | {written(result, result.rows[f'{DENSE}/{DENSE}/0'])} | "
            f"{', '.join(cells)} | {_of_best(over)} | {share} | "
            f"{_of_best(published)} |"
        )
    return "\n".join(lines)


def titled(results: Sequence[RaceResult]) -> dict[str, RaceResult]:
    """Every race by its recipe's name; where a recipe was raced on several amounts of data, with the amount."""
    names = [result.head["recipe"] for result in results]
    found: dict[str, RaceResult] = {}
    for name, result in zip(names, results, strict=True):
        title = name if names.count(name) == 1 else f"{name} ({result.head['calibration_examples']} to calibrate)"
        if title in found:
            raise UsageError(
                "two races of one recipe and one amount of data", got=f"{found[title].path}, {result.path}"
            )
        found[title] = result
    return found


def _others(result: RaceResult) -> int:
    """How many contestants beside ours have rows."""
    known = contestants()
    names = {row["contestant"] for row in sound(result) if row["contestant"] != DENSE}
    return len([name for name in names if name not in known or not known[name].ours])


def _of_best(over: Summary) -> str:
    return f"{over.share:.2f}" if over.other_lost > 0 else "nothing lost"


def _our_refit() -> list[str]:
    return [name for name, c in contestants().items() if c.our_refit]


def with_section(text: str, body: str) -> str:
    """`text` with what lies between the markers replaced. Raises ValueError when a marker is missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no section between {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{body}\n{END}{after}"


def facts(result: RaceResult) -> str:
    """Metric, data and budget in one sentence."""
    head, dense = result.head, result.rows[f"{DENSE}/{DENSE}/0"]
    versions = sorted({f"{p['package']} {p['version']}" for p in head["peers"].values()})
    return (
        f"{head['metric']} {written(result, dense)} dense, judged on {dense['n']} examples, "
        f"{head['calibration_examples']} calibration examples, {head['prunable'] / head['params']:.0%} of the "
        f"parameters lie in prunable units{'; ' + ', '.join(versions) if versions else ''}."
    )


def left_out(result: RaceResult) -> dict[str, str]:
    """Peers that could not take part and why; those of one reason under one name."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in result.head["not_supported"].items():
        by_reason.setdefault(reason, []).append(name)
    return {", ".join(names): reason for reason, names in by_reason.items()}


def table(result: RaceResult) -> list[str]:
    """A line per contestant and form, the metric at every size; the best of each size in bold."""
    sizes = sizes_of(result)
    rows = [row for row in result.rows.values() if row["contestant"] != DENSE]
    best = {}
    for asked in sizes:
        here = [row for row in sound(result, FORM_NAMES) if row["asked"] == asked]
        best[asked] = min(lost(result, row) for row in here) if here else 0.0
    lines = ["| contestant | form | " + " | ".join(f"{s:.0%}" for s in sizes) + " |", "|---" * (2 + len(sizes)) + "|"]
    for contestant in dict.fromkeys(row["contestant"] for row in rows):
        for form in FORM_NAMES:
            own = {row["asked"]: row for row in rows if (row["contestant"], row["form"]) == (contestant, form)}
            if not own:
                continue
            cells = []
            for asked in sizes:
                row = own.get(asked)
                text = "" if row is None else "—" if "error" in row else written(result, row)
                bold = row is not None and "error" not in row and lost(result, row) <= best[asked] + 1e-9
                cells.append(f"**{text}**" if bold else text)
            lines.append(f"| {contestant} | {shown_form(contestant, form)} | " + " | ".join(cells) + " |")
    return lines


def shown_form(contestant: str, form: str) -> str:
    """What was done to the weights that stay, in words."""
    known = contestants().get(contestant)
    if form == "own" and known is not None and known.ours:
        return "our default"
    if form == "own" and known is not None and known.our_refit:
        return f"{' and '.join(f'{kind}s' for kind in known.kinds or ('all kind',))}, our refit"
    return FORM_NAMES[form]


def verdicts(result: RaceResult, trained: str | None = None) -> list[str]:
    """Ours against the best other contestant at each size, and over all sizes."""
    found = points(result) if trained is None else points(result, (trained,), form=trained)
    if not found:
        return ["Ours has not run yet."]
    unit = found[0].unit
    fair = [apart(result, key_of(p.ours), p.others) for p in found]
    lines = [
        f"| removed | ours | lost | best other | lost | ours loses more by ({unit}, 95 % interval) | "
        "| best other chosen on other examples: lost | ours loses more by | |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_verdict_line(result, p, a) for p, a in zip(found, fair, strict=True)),
    ]
    over = summary(found)
    lines += [
        "",
        f"Of {over.points} sizes ours is ahead at {over.ahead} and behind at {over.behind}; it loses "
        f"{_figure(over.lost, unit)} {unit} on average where the best other loses {_figure(over.other_lost, unit)}"
        + (
            f": {over.share:.2f} of it (mean of the sizes' own shares {over.mean_share:.2f})."
            if over.other_lost > 0
            else "; a loss below 0 is a gain."
        ),
        "",
        _fairly(found, fair),
    ]
    if trained is None and (one := best_throughout(result)) is not None:
        name, form, mean = one
        lines += [
            "",
            f"The one other that loses least over all sizes is {name} ({shown_form(name, form)}): "
            f"{_figure(mean, unit)} on average{_of_which(over.lost, mean)}.",
        ]
    if trained is None:
        over = summary(points(result, ("own",), without=_our_refit()))
        lines += [
            "",
            f"Against the others as published, without our refit: ahead at {over.ahead} of {over.points} sizes, behind "
            f"at {over.behind}; {_figure(over.lost, unit)} {unit} lost where the best of them loses "
            f"{_figure(over.other_lost, unit)}" + (f": {over.share:.2f} of it." if over.other_lost > 0 else "."),
        ]
    return lines


def _fairly(found: Sequence[Point], fair: Sequence[Apart]) -> str:
    """Over all sizes, against bests that were chosen on examples other than those that judge them."""
    unit = found[0].unit
    standings = [a.difference.standing for a in fair]
    ours, theirs = (sum(each) / len(fair) for each in ([p.lost for p in found], [a.other_lost for a in fair]))
    return (
        f"Chosen on other examples than those that judge it, the best other loses {_figure(theirs, unit)} {unit} on "
        f"average{_of_which(ours, theirs)}; ours is ahead at "
        f"{standings.count('ahead')} and behind at {standings.count('behind')}."
    )


def _of_which(ours: float, theirs: float) -> str:
    """Which share ours loses of what others lose, where they lose anything."""
    return f", of which ours loses {ours / theirs:.2f}" if theirs > 0 else ""


def _verdict_line(result: RaceResult, p: Point, a: Apart) -> str:
    form = shown_form(p.other["contestant"], p.other["form"])
    d = p.difference
    fairly = f"{_figure(a.other_lost, p.unit)} | {_with_interval(a.difference, p.unit)} | {a.difference.standing}"
    return (
        f"| {p.asked:.0%} | {written(result, p.ours)} | {_figure(p.lost, p.unit)} | {p.other['contestant']} "
        f"({form}) {written(result, p.other)} | {_figure(p.other_lost, p.unit)} | "
        f"{_with_interval(d, p.unit)} | {d.standing} | {fairly} |"
    )


def latencies(result: RaceResult) -> list[str]:
    """Median latency of the timed members, where there are any."""
    timed = [row for row in result.rows.values() if "latency" in row]
    if not timed:
        return []
    sizes = ", ".join(f"{k} {v}" for k, v in timed[0]["latency"]["sizes"].items())
    lines = [
        f"Latency, onnxruntime CPU, {sizes}:",
        "",
        "| removed | contestant | form | p50 ms | of dense | |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(timed, key=lambda row: row["asked"]):
        own = row["latency"]
        ratio = own["ratio"]
        doubt = "" if own["trusted"] else "; the cell's self-check failed"
        name = row["contestant"]
        lines.append(
            f"| {row['asked']:.0%} | {name} | {shown_form(name, row['form'])} | {own['p50_ms']:.2f} | "
            f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] | {own['verdict']}{doubt} |"
        )
    return [*lines, ""]


def written(result: RaceResult, row: dict[str, Any]) -> str:
    """The metric as it is usually given: 84.0 for shares and correlations, 25.5 for perplexity."""
    value = row["value"] if result.head["metric"] == "perplexity" else 100 * row["value"]
    return f"{value:.1f}"


def _figure(value: float, unit: str) -> str:
    return f"{value:.1f}" if unit == "points" else f"{value:.3f}"


def _with_interval(d: Difference, unit: str) -> str:
    return f"{_figure(d.value, unit)} [{_figure(d.low, unit)}, {_figure(d.high, unit)}]"


if __name__ == "__main__":
    main()
