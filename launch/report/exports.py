"""The words and tables of a report as Markdown and CSV."""

import csv
import io
import math
import re
from html import escape
from typing import Any

from launch.report.comparison import Section
from launch.report.estimates import Estimate, PairedTest
from launch.report.record import Record
from launch.report.tables import (
    HOW,
    TESTING,
    Table,
    chosen_keys,
    conditions,
    facts,
    failed,
    headline,
    tables,
)


def markdown(sections: list[Section], records: list[Record]) -> str:
    """Returns what won, the tables and the failures as Markdown."""
    parts = []
    for section in sections:
        told = headline(section)
        parts += [
            f"## {plain_text(section.title)}",
            plain_text(conditions(section)),
            "\n".join(f"- {plain_text(text)}" for text in told),
        ]
        for table in (
            tables(section)
            if len(section.runs) > 1
            else [facts(section.runs[0]), chosen_keys(section.runs[0])]
        ):
            parts += (
                [f"**{plain_text(table.caption)}**", markdown_table(table)] if table.rows else []
            )
        parts += [HOW, TESTING] if section.best and len(section.runs) > 1 else []
    failures = failed(records)
    parts += ["## Runs that did not finish", markdown_table(failures) if failures.rows else "None."]
    return "\n\n".join(parts) + "\n"


def methods_csv(sections: list[Section]) -> str:
    """Returns a row for every method and budget."""
    header = [
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
    rows = []
    for section in sections:
        for axis in section.chosen:
            for method, setting in section.chosen[axis].items():
                tried = sum(bool(other.chosen_by) for other in section.methods[method])
                found, doubt = (
                    section.at_equal(axis, method),
                    section.doubt if axis == "seconds" else "",
                )
                rows.append(
                    [
                        section.title,
                        method,
                        setting.lr,
                        setting.rho,
                        tried,
                        section.selectors[method],
                        axis,
                        section.budgets[axis],
                        *found[:2],
                        *ends(found),
                        found.seeds,
                        section.planned,
                        found.midway,
                        doubt,
                        section.imprecise.get(method),
                        *difference_cells(section.tests[axis].get(method), section.baseline),
                    ]
                )
    return csv_text(header, rows)


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
        *found[:2],
        *ends(found),
        found.midway,
        test.t,
        test.p,
        test.holm,
    ]


def ends(found: Estimate) -> tuple[float, float]:
    """Returns the ends of the 95 % interval."""
    return found.mean - found.margin, found.mean + found.margin


def runs_csv(sections: list[Section], records: list[Record]) -> str:
    """A row for every run, in the order they were found."""
    title = {id(run): section.title for section in sections for run in section.runs}
    names = ["step", "tokens", "flops", "seconds", "skipped", "val/loss", "val/bits_per_byte"]
    header = ["run", "comparison", "state", "reason", "method", "lr", "rho", "seed", *names]
    keys = ("optim.name", "optim.lr", "optim.rho", "seed")
    rows = [
        [
            run.folder,
            title.get(id(run)),
            run.state,
            run.reason,
            *(run.settings.get(key) for key in keys),
            *(run.summary.get(name) for name in names),
        ]
        for run in records
    ]
    return csv_text(header, rows)


def csv_text(header: list[str], rows: list[list]) -> str:
    """Returns rows as CSV; what is unknown is left empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([[csv_cell(value) for value in row] for row in rows])
    return out.getvalue()


def csv_cell(value: Any) -> Any:
    """Returns the value of a cell; a text that a spreadsheet would take for a formula gets an
    apostrophe before it, which makes it text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (int, float)):
        return value
    # which csv would leave bare, and readers take for the end of the row
    text = str(value).replace("\r", " ")
    return f"'{text}" if re.match(r"\t|\s*[=+\-@\uff1d\uff0b\uff0d\uff20]", text) else text


def markdown_table(table: Table) -> str:
    """Returns the same for Markdown."""
    rule = [":--" if column in table.text else "--:" for column in range(len(table.header))]
    lines = [table.header, rule, *([plain_text(text) for text in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain_text(text: str) -> str:
    """Returns a text such that Markdown shows it as it is: on one line, and without meaning for it
    or for HTML."""
    line = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", escape(" ".join(text.split()), quote=False))
    # What would begin a heading, a list or a rule.
    line = re.sub(r"^(\d+)(?=[.)](\s|$))", r"\1\\", line)
    return re.sub(r"^(?=(#+|[-+])(\s|$)|[=-]+$)", r"\\", line)
