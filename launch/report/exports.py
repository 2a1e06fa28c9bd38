"""The words and tables of a report as Markdown and CSV."""

import csv
import io
import math
import re
from html import escape
from typing import Any

from launch.report.estimates import Estimate, PairedTest
from launch.report.record import Record
from launch.report.section import Section
from launch.report.tables import Table, result_tables, unfinished_table
from launch.report.wording import HOW, TESTING, conditions, headline

METHODS = [
    "comparison",
    "method",
    "lr",
    "rho",
    "settings",
    "chosen",
    "at_equal",
    "budget",
    "mean",
    "standard_error",
    "low_95",
    "high_95",
    "seeds",
    "planned_seeds",
    "midway",
    "no_evidence",
    "precision",
    "baseline",
    "pairs",
    "differences",
    "mean_difference",
    "difference_standard_error",
    "difference_low_95",
    "difference_high_95",
    "difference_midway",
    "t",
    "p",
    "p_holm",
]


def markdown(sections: list[Section], records: list[Record]) -> str:
    """Returns what won, the tables and the failures as Markdown."""
    parts = []
    for section in sections:
        parts += [
            f"## {markdown_text(section.title)}",
            markdown_text(conditions(section)),
            "\n".join(f"- {markdown_text(text)}" for text in headline(section)),
        ]
        for table in result_tables(section):
            parts += [f"**{markdown_text(table.caption)}**", markdown_table(table)]
        # A run that stands alone has neither an interval nor a test to explain.
        if section.best and len(section.runs) > 1:
            parts += [HOW, TESTING]
    parts.append("## Runs that did not finish")
    failures = unfinished_table(records)
    if failures.rows:
        parts.append(markdown_table(failures))
    else:
        parts.append("None.")
    return "\n\n".join(parts) + "\n"


def methods_csv(sections: list[Section]) -> str:
    """Returns a row for every method and budget."""
    # Numbers have all of their digits here, for further computing; the tables are rounded.
    rows = [
        method_cells(section, axis, method)
        for section in sections
        for axis in section.chosen
        for method in section.chosen[axis]
    ]
    return csv_text(METHODS, rows)


def method_cells(section: Section, axis: str, method: str) -> list[Any]:
    """Returns the cells of a method at the budget of an axis."""
    setting = section.chosen[axis][method]
    found = section.at_equal(axis, method)
    return [
        section.title,
        method,
        setting.lr,
        setting.rho,
        len(section.tried(method)),
        section.selectors[method],
        axis,
        section.budgets[axis],
        found.mean,
        found.error,
        *interval(found),
        found.seeds,
        section.planned,
        found.midway,
        section.doubt if axis == "seconds" else "",
        section.imprecise.get(method),
        *difference_cells(section.tests[axis].get(method), section.baseline),
    ]


def difference_cells(test: PairedTest | None, baseline: str | None) -> list[Any]:
    """Returns the cells of a comparison by seed, empty where there is none."""
    if test is None:
        return [None] * 11
    each = "; ".join(f"seed {seed}: {difference:.6g}" for seed, difference in test.by_seed.items())
    found = test.difference
    return [
        baseline,
        found.seeds,
        each,
        found.mean,
        found.error,
        *interval(found),
        found.midway,
        test.t,
        test.p,
        test.holm,
    ]


def interval(found: Estimate) -> tuple[float, float]:
    """Returns the ends of the 95 % interval."""
    return found.mean - found.margin, found.mean + found.margin


def runs_csv(sections: list[Section], records: list[Record]) -> str:
    """Returns a row for every run, in the order they were found."""
    title = {id(run): section.title for section in sections for run in section.runs}
    names = ["step", "tokens", "flops", "seconds", "skipped", "val/loss", "val/bits_per_byte"]
    header = ["run", "comparison", "state", "reason", "method", "lr", "rho", "seed", *names]
    keys = ("optim.name", "optim.lr", "optim.rho", "seed")
    rows: list[list[Any]] = []
    for run in records:
        rows.append([run.name, title.get(id(run)), run.state, run.reason])
        rows[-1] += map(run.settings.get, keys)
        rows[-1] += map(run.summary.get, names)
    return csv_text(header, rows)


def csv_text(header: list[str], rows: list[list]) -> str:
    """Returns rows as CSV; what is unknown is left empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([csv_cell(value) for value in row])
    return out.getvalue()


def csv_cell(value: Any) -> Any:
    """Returns the value of a cell; a text that a spreadsheet would take for a formula gets an
    apostrophe before it, which makes it text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (int, float)):
        return value
    # csv would leave a carriage return bare, and readers take that for the end of the row.
    text = str(value).replace("\r", " ")
    # The last four are the same signs in full width, which spreadsheets take for them.
    if re.match(r"\t|\s*[=+\-@\uff1d\uff0b\uff0d\uff20]", text):
        return f"'{text}"
    return text


def markdown_table(table: Table) -> str:
    """Returns a table as Markdown."""
    # :-- aligns a column of text to the left, --: one of numbers to the right.
    rule = [":--" if column in table.text else "--:" for column in range(len(table.header))]
    rows = [list(map(markdown_text, row)) for row in table.rows]
    lines = [table.header, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_text(text: str) -> str:
    """Returns a text such that Markdown shows it as it is: on one line, and without meaning for it
    or for HTML."""
    line = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", escape(" ".join(text.split()), quote=False))
    # A heading, a list or a rule would begin with these.
    line = re.sub(r"^(\d+)(?=[.)](\s|$))", r"\1\\", line)
    return re.sub(r"^(?=(#+|[-+])(\s|$)|[=-]+$)", r"\\", line)
