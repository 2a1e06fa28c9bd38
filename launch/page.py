"""The page of a report, and its tables as Markdown and CSV."""

import csv
import io
import math
import re
from collections.abc import Iterable
from html import escape
from typing import NamedTuple

import numpy as np

from launch import charts
from launch.comparison import AXES, Estimate, PairedTest, Section, Setting
from launch.record import Record

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --panel: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --back: #0f1419; --ink: #e6edf3; --soft: #9aa7b4; --line: #333d47; --panel: #171d24; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
       overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.3rem 0 .3rem; } p, ul { margin: .4rem 0; } ul { padding-left: 1.2rem; }
.soft, figcaption { color: var(--soft); font-size: .88rem; }
.won { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem 1rem; margin: .8rem 0; }
.note { border-left: 3px solid #e69f00; padding-left: .7rem; }
.box { overflow-x: auto; max-width: 100%; margin: .5rem 0; }
table { border-collapse: separate; border-spacing: 0; overflow-wrap: normal; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--back); }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
td.text, th.text { text-align: left; } td.long { white-space: normal; min-width: 16rem; } td.wrap { white-space: normal; min-width: 10rem; }
thead th { border-bottom: 2px solid var(--line); white-space: normal; vertical-align: bottom; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
figure { margin: 0; break-inside: avoid; } svg { display: block; width: 100%; height: auto; }
summary { cursor: pointer; margin-top: 1rem; font-weight: 600; }
@media (max-width: 30rem) {
  body { padding: .7rem; } table { font-size: .78rem; } th, td { padding: .25rem .3rem; white-space: normal; } td:first-child { min-width: 6.6rem; }
}
@media print {
  :root { color-scheme: light; --back: #ffffff; --ink: #000000; --soft: #444444; --line: #bbbbbb; --panel: #ffffff; }
  body { max-width: none; padding: 0; font-size: 10pt; } .box { overflow: visible; } table { font-size: 7.5pt; } th, td { padding: .1rem .3rem; }
  th, td, td.long, td.wrap, td:first-child { white-space: normal; min-width: 0; position: static; }
  .charts { grid-template-columns: 1fr 1fr; } h2, h3 { break-after: avoid; } tr, .won { break-inside: avoid; }
  details::details-content { content-visibility: visible; }
}
"""
AT = {"steps": "equal steps", "flops": "equal FLOPs", "seconds": "equal time"}
MIDWAY = "\u2020"
HOW = (
    "\u00b1 is the standard error over seeds, n their number. Every method stands with the one setting (learning rate, radius) whose runs have the "
    "lowest mean final loss, taken from the same seeds: the more settings a method tried, the more luck is in its figure. The budget of equal FLOPs "
    "and of equal time is the largest that all runs compared here reached; a run that ends within 5 % of it counts with its final loss, any other is "
    "read on the straight line between its two evaluations around the budget. Time is spent in steps, without evaluations."
)
UNANNEALED = (
    f"{MIDWAY} read in the middle of the learning-rate schedule: the rate is not annealed there yet, which costs these runs loss that a run of this "
    "length would not pay. optim.compute_matched=true trains a method to AdamW's FLOPs on a schedule of its own."
)


class Table(NamedTuple):
    """Rows of text under a header; columns in `text` are left-aligned."""

    header: list[str]
    rows: list[list[str]]
    text: tuple[int, ...] = (0,)
    caption: str = ""


def page(sections: list[Section], records: list[Record], made: str, axis: str = "step") -> str:
    """The whole report as one HTML document; `axis` is what other curves than those of the validation loss are drawn against."""
    looks = charts.styles(method for section in sections for method in section.methods)
    failures = failed(records)
    count = {"finished": len(records) - len(failures.rows), "not finished": len(failures.rows)}
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>flatgpt: {len(records)} runs</title><style>{STYLE}</style></head><body>",
        f'<h1>{plural(len(records), "run")} compared</h1><p class="soft">{count["finished"]} finished, {count["not finished"]} not; '
        f"{plural(len(sections), 'comparison')}; made {escape(made)}.</p>",
    ]
    for number, section in enumerate(sections):
        heading = f'<h3><a href="#section{number}">{escape(section.title)}</a></h3>' if len(sections) > 1 else ""
        parts.append(f'<div class="won">{heading}<ul>{items(winners(section))}</ul></div>')
    if failures.rows:
        parts.append(f"<h2>Runs that did not finish</h2>{html(failures)}")
    parts += [section_html(section, looks, number, axis) for number, section in enumerate(sections)]
    return "\n".join([*parts, "</body></html>\n"])


def section_html(section: Section, looks: dict[str, charts.Style], number: int, axis: str) -> str:
    """One comparison: tables, notes, charts, runs."""
    parts = [f'<h2 id="section{number}">{escape(section.title)}</h2>', f'<p class="soft">{escape(conditions(section))}</p>']
    if not section.best:
        return "\n".join([*parts, "<p>No run is finished yet.</p>"])
    parts += [titled(by_method(section)), titled(paired(section))]
    parts += [f'<p class="soft">{escape(text)}</p>' for text in method_notes(section)]
    parts += [f'<p class="note">{escape(text)}</p>' for text in section.notes]
    drawn: list[tuple[str, str | None]] = [
        (f"Validation loss against {name}. Best settings; bands are a standard error to both sides; the first fifth is cut off.",
         charts.loss_chart(section, looks, against))
        for against, name in (("step", "steps and tokens"), ("flops", "training FLOPs"), ("seconds", "training time"))
    ]  # fmt: skip
    drawn += [
        (
            "Training loss (clean). Rules of one pass, which see only the loss at the moved weights, have none.",
            charts.training_chart(section, looks, axis),
        ),
        ("Response to the radius, each method at its best learning rate.", charts.response_chart(section, looks, "rho")),
        ("Response to the learning rate, each method at its best radius.", charts.response_chart(section, looks, "lr")),
    ]
    parts.append(f"<h3>Loss</h3>{grid(drawn)}")
    parts.append(titled(cost(section)))
    measured = charts.measured_charts(section, looks, axis)
    parts.append(f"<h3>Sharpness, gradient and speed while training, best settings</h3>{grid(measured.items())}")
    parts.append(f"<details><summary>All {plural(len(section.runs), 'run')}</summary>{html(all_runs(section))}</details>")
    return "\n".join(parts)


def winners(section: Section) -> list[str]:
    """What won at equal steps, FLOPs and time, a sentence each."""
    if not section.best:
        return ["No run is finished yet."]
    if len(section.best) == 1:
        (setting,) = section.best.values()
        return [
            f"{setting}: final validation loss {figure(setting.final)}, {plural(setting.final.seeds, 'seed')}. There is no other method to compare."
        ]
    sentences = []
    for axis in AXES:
        first, *others = section.ranked(axis)
        found = section.at_equal(axis, first)
        sentence = f"At {AT[axis]} ({spent(section, axis)}): {section.best[first]} has the lowest validation loss, {figure(found)}"
        sentence += f" over {plural(found.seeds, 'seed')}{MIDWAY if found.midway else ''}"
        tried = first if first != section.baseline else others[0] if others else None
        if tried and (test := section.tested(axis, tried)):
            difference = f"{signed(test.difference.mean)}, " if test.difference.seeds else ""
            sentence += f"; {tried} minus {section.baseline} by seed: {difference}{verdict(test.difference.seeds, test.p)}"
        sentences.append(sentence + ".")
    return sentences


def verdict(pairs: int, p: float) -> str:
    """What a paired test says."""
    if pairs < 2:
        return f"{plural(pairs, 'pair')} of seeds, too few for a test"
    if math.isnan(p):
        return f"the same in all {pairs} pairs of seeds"
    return f"p = {p:.2g} in {pairs} pairs of seeds" + ("" if p < 0.05 else ", which may be chance")


def tables(section: Section) -> list[Table]:
    """Validation loss by method, the paired tests, and what the methods cost."""
    return [by_method(section), paired(section), cost(section)]


def titled(table: Table) -> str:
    """A table under its caption, nothing where it has no rows."""
    return f"<h3>{escape(table.caption)}</h3>{html(table)}" if table.rows else ""


def by_method(section: Section) -> Table:
    """Validation loss by method at equal steps, FLOPs and time."""
    lowest = {axis: section.ranked(axis)[:1] for axis in AXES}
    rows = []
    for method, setting in section.best.items():
        losses, seeds = [], []
        for axis in AXES:
            found = section.at_equal(axis, method)
            marks = MIDWAY * found.midway + " *" * ([method] == lowest[axis] and len(section.best) > 1)
            losses.append(figure(found) + marks if found.seeds else "ends earlier" if axis == "steps" else "not reached")
            seeds.append(str(found.seeds or ""))
        best = [f"{setting.lr:g}", "" if setting.rho is None else f"{setting.rho:g}"]
        rows.append([method, *losses, *best, str(len(section.methods[method])), *seeds])
    at = [f"{AT[axis]}: {spent(section, axis)}" for axis in AXES]
    header = ["method", *at, "best lr", "best rho", "settings", *(f"n, {AT[axis]}" for axis in AXES)]
    return Table(header, rows, caption="Validation loss (nats per token) by method; * is the lowest")


def paired(section: Section) -> Table:
    """Each method beside AdamW by seed."""
    tests = {method: [section.tested(axis, method) for axis in AXES] for method in section.best}
    rows = [[method, *(tested(test) for test in found if test)] for method, found in tests.items() if all(found)]
    caption = f"Difference to {section.baseline}, paired by seed (negative: a lower loss; two-sided t-test)"
    return Table(["method", *(f"at {AT[axis]}" for axis in AXES)], rows, caption=caption)


def tested(test: PairedTest) -> str:
    """A paired test in a cell."""
    difference, error, pairs, _ = test.difference
    if pairs < 2:
        return f"{signed(difference)} ({plural(pairs, 'pair')}: too few)".strip()
    of = f"{pairs} pairs" if math.isnan(test.p) else f"t {test.t:.2f}, p {test.p:.2g}, {pairs} pairs"
    return f"{signed(difference)} \u00b1 {error:.4f} (" + of.replace(" ", "\u00a0") + ")"  # the only place to break is before the bracket


def cost(section: Section) -> Table:
    """What a step of each method costs, beside AdamW's."""
    rates = {method: rate(setting) for method, setting in section.best.items()}
    base = rates.get(section.baseline or "", (math.nan,) * 4)
    rows = [
        [method, plain(speed, ",.0f"), plain(seconds / base[1], ".2f"), plain(flops / base[2], ".2f"), plain(utilisation, ".1%")]
        for method, (speed, seconds, flops, utilisation) in rates.items()
    ]
    header = ["method", "tokens per second (median)", "time of a step / AdamW's", "FLOPs of a step / AdamW's", "MFU (median)"]
    known = [column for column in range(len(header)) if any(row[column] for row in rows)]  # MFU needs a device whose peak is known
    header, rows = [header[column] for column in known], [[row[column] for column in known] for row in rows]
    return Table(header, rows, caption="Throughput")


def rate(setting: Setting) -> tuple[float, float, float, float]:
    """(tokens per second, seconds and FLOPs of a step, MFU) of a setting, means over its runs."""
    runs = setting.runs
    medians = [float(np.mean([np.median(values) if len(values := run.curve("step", name)[1]) else math.nan for run in runs]))
               for name in ("perf/tokens_per_second", "perf/mfu")]  # fmt: skip
    steps = [run.summary["step"] for run in runs]
    seconds, flops = (float(np.mean([run.summary[name] / step for run, step in zip(runs, steps, strict=True)])) for name in ("seconds", "flops"))
    return medians[0], seconds, flops, medians[1]


def failed(records: list[Record]) -> Table:
    """Every run that is not finished."""
    rows = [
        [str(run.folder), run.state, *swept(run), f"{run.step:,}", run.reason]
        for run in records if run.state != "finished"
    ]  # fmt: skip
    return Table(["run", "state", "method", "lr", "rho", "seed", "last step", "why"], rows, (0, 1, 2, 7))


def all_runs(section: Section) -> Table:
    """Every run of a section."""
    rows = []
    for run in sorted(section.runs, key=lambda run: (math.isnan(run.loss), run.loss)):
        last = [f"{run.step:,}", plain(run.summary.get("flops", math.nan), ".3g"), plain(run.summary.get("seconds", math.nan), ",.0f")]
        rows.append([run.folder.name, *swept(run), plain(run.loss), *last, str(run.summary.get("skipped", "")), run.state])
    return Table(["run", "method", "lr", "rho", "seed", "final loss", "steps", "FLOPs", "seconds", "skipped steps", "state"], rows, (0, 1, 10))


def swept(run: Record) -> list[str]:
    """Method, learning rate, radius and seed of a run, as far as it tells."""
    values = [run.settings.get(name) for name in ("optim.name", "optim.lr", "optim.rho", "seed")]
    return ["" if value is None else f"{value:g}" if isinstance(value, float) else str(value) for value in values]


def conditions(section: Section) -> str:
    """What all runs of a section share, in a line."""
    keys = section.keys
    tokens = keys["batch.sequences"] * keys["batch.length"]
    return (f"{keys['model.num_layers']} layers x {keys['model.width']}, tokenizer {keys['tokenizer.name']}, {keys['batch.sequences']} sequences x "
            f"{keys['batch.length']} = {tokens:,} tokens a step, {keys['schedule.shape']} schedule; {plural(len(section.runs), 'run')}")  # fmt: skip


def method_notes(section: Section) -> list[str]:
    """How the figures came about, and what is to be said against some of them."""
    midway = any(section.at_equal(axis, method).midway for axis in AXES for method in section.best)
    return [
        HOW,
        *([UNANNEALED] if midway else []),
        *(["No run of AdamW is finished here, so there is no paired test."] if not section.baseline else []),
    ]


def markdown(sections: list[Section], records: list[Record]) -> str:
    """What won, the tables and the failures as Markdown."""
    parts = []
    for section in sections:
        parts += [f"## {section.title}", conditions(section), "\n".join(f"- {sentence}" for sentence in winners(section))]
        if section.best:
            for table in tables(section):
                parts += [f"**{table.caption}**", markdown_table(table)] if table.rows else []
            parts += [*method_notes(section), *section.notes]
    failures = failed(records)
    parts += ["## Runs that did not finish", markdown_table(failures) if failures.rows else "None."]
    return "\n\n".join(parts) + "\n"


def methods_csv(sections: list[Section]) -> str:
    """A row for every method and budget."""
    header = ["comparison", "method", "lr", "rho", "settings", "at_equal", "budget", "mean", "standard_error", "seeds", "midway",
              "baseline", "pairs", "mean_difference", "difference_standard_error", "t", "p"]  # fmt: skip
    rows = []
    for section in sections:
        for method, setting in section.best.items():
            for axis in AXES:
                found, test = section.at_equal(axis, method), section.tested(axis, method)
                tested = (
                    [section.baseline, test.difference.seeds, test.difference.mean, test.difference.error, test.t, test.p] if test else [None] * 6
                )
                rows.append(
                    [section.title, method, setting.lr, setting.rho, len(section.methods[method]), axis, section.budgets[axis], *found, *tested]
                )
    return csv_text(header, rows)


def runs_csv(sections: list[Section], records: list[Record]) -> str:
    """A row for every run, in the order they were found."""
    title = {id(run): section.title for section in sections for run in section.runs}
    names = ["step", "tokens", "flops", "seconds", "skipped", "val/loss", "val/bits_per_byte"]
    header = ["run", "comparison", "state", "reason", "method", "lr", "rho", "seed", *names]
    keys = ("optim.name", "optim.lr", "optim.rho", "seed")
    rows = [[run.folder, title.get(id(run)), run.state, run.reason, *(run.settings.get(key) for key in keys),
             *(run.summary.get(name) for name in names)] for run in records]  # fmt: skip
    return csv_text(header, rows)


def csv_text(header: list[str], rows: list[list]) -> str:
    """Rows as CSV; what is unknown is left empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if value is None or (isinstance(value, float) and math.isnan(value)) else value for value in row] for row in rows])
    return out.getvalue()


def spent(section: Section, axis: str) -> str:
    """The budget of an axis, as a person reads it."""
    budget = section.budgets[axis]
    return {"steps": f"{budget:,.0f} steps", "flops": f"{budget:.3g} FLOPs", "seconds": f"{budget:,.0f} s" if budget >= 10 else f"{budget:.2g} s"}[
        axis
    ]


def figure(found: Estimate) -> str:
    """A mean with its standard error, where it has one."""
    return f"{found.mean:.4f}" + ("" if math.isnan(found.error) else f" \u00b1 {found.error:.4f}")


def plain(value: float, form: str = ".4f") -> str:
    """A number, or nothing where it is unknown."""
    return "" if math.isnan(value) else f"{value:{form}}"


def signed(value: float) -> str:
    return "" if math.isnan(value) else f"{value:+.4f}"


def plural(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def items(texts: Iterable[str]) -> str:
    return "".join(f"<li>{escape(text)}</li>" for text in texts)


def grid(drawn: Iterable[tuple[str, str | None]]) -> str:
    """Charts with their captions, side by side where there is room."""
    figures = [f"<figure>{chart}<figcaption>{escape(caption)}</figcaption></figure>" for caption, chart in drawn if chart]
    return f'<div class="charts">{"".join(figures)}</div>'


def html(table: Table) -> str:
    """A table in a box of its own that scrolls where it is too wide."""
    head = "".join(f"<th{aligned(table, column)}>{escape(text)}</th>" for column, text in enumerate(table.header))
    rows = "".join("<tr>" + "".join(cell(table, column, text) for column, text in enumerate(row)) + "</tr>" for row in table.rows)
    return f'<div class="box"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def cell(table: Table, column: int, text: str) -> str:
    """A cell; names may break after _ and /, figures before their error."""
    shown = re.sub("([_/])", r"\1<wbr>", escape(text)) if column == 0 else re.sub("(?<=\u00b1) | (?=\\*$)", "\u00a0", escape(text))
    return f"<td{aligned(table, column, text)}>{shown}</td>"


def aligned(table: Table, column: int, text: str = "") -> str:
    """The class of a cell: text stands to the left, and what is long may take several lines."""
    names = ["text"] * (column in table.text) + ["long"] * (column in table.text and len(text) > 60) + ["wrap"] * (len(text) > 30)
    return f' class="{" ".join(names)}"' if names else ""


def markdown_table(table: Table) -> str:
    """The same for Markdown."""
    rule = [":--" if column in table.text else "--:" for column in range(len(table.header))]
    lines = [table.header, rule, *([text.replace("|", "\\|").replace("\n", " ") for text in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
