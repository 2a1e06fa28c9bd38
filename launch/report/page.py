"""The page of a report."""

import os
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from urllib.parse import quote

from launch.report import charts
from launch.report.comparison import Section
from launch.report.meanings import meaning
from launch.report.record import Record
from launch.report.tables import (
    HOW,
    TESTING,
    Table,
    all_runs,
    caveats,
    chosen_keys,
    conditions,
    facts,
    failed,
    plural,
    tables,
    winners,
)

STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
PARTS = {
    "results": "Results",
    "losses": "Loss",
    "training": "Sharpness, gradient and speed while training",
    "runs": "Runs",
}


def page(sections: list[Section], records: list[Record], made: str, axis: str, beside: Path) -> str:
    """Returns the whole report as one HTML document.

    Args:
        sections: the comparisons
        records: all runs
        made: when
        axis: what other curves than those of the validation loss are drawn against
        beside: the folder of the page, from which links lead to runs
    """
    looks = charts.styles(method for section in sections for method in section.methods)
    failures = failed(records)
    count = {"finished": len(records) - len(failures.rows), "not finished": len(failures.rows)}
    parts = [
        (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport"'
            ' content="width=device-width, initial-scale=1">'
        ),
        f"<title>flatgpt: {plural(len(records), 'run')}</title><style>{STYLE}</style></head><body>",
        f"<h1>{plural(len(records), 'run')}{' compared' if len(records) > 1 else ''}</h1>"
        f'<p class="soft">{count["finished"]} finished, {count["not finished"]} not; '
        f"{plural(len(sections), 'comparison')}; made {escape(made)}.</p>",
        contents(sections, bool(failures.rows)),
    ]
    for section in sections:
        heading = f"<h3>{escape(section.title)}</h3>" if len(sections) > 1 else ""
        against = f'<ul class="soft">{items(caveats(section))}</ul>' if caveats(section) else ""
        parts.append(f'<div class="won">{heading}<ul>{items(winners(section))}</ul>{against}</div>')
    if failures.rows:
        parts.append(f'<h2 id="failed">Runs that did not finish</h2>{html(failures, beside)}')
    parts += [
        section_html(section, looks, number, axis, beside)
        for number, section in enumerate(sections)
    ]
    return "\n".join([*parts, "</body></html>\n"])


def contents(sections: list[Section], failures: bool) -> str:
    """Returns the table of contents: every comparison with its parts."""
    entries = ['<a href="#failed">Runs that did not finish</a>'] * failures
    for number, section in enumerate(sections):
        parts = [f'<a href="#section{number}-{name}">{title}</a>' for name, title in PARTS.items()]
        entries.append(
            f'<a href="#section{number}">{escape(section.title)}</a>: {", ".join(parts)}'
        )
    return f"<nav><ul>{''.join(f'<li>{entry}</li>' for entry in entries)}</ul></nav>"


def section_html(
    section: Section, looks: dict[str, charts.Style], number: int, axis: str, beside: Path
) -> str:
    """Returns one comparison: tables, notes, charts, runs."""
    heads = {name: f'<h3 id="section{number}-{name}">{title}</h3>' for name, title in PARTS.items()}
    parts = [
        f'<h2 id="section{number}">{escape(section.title)}</h2>',
        f'<p class="soft">{escape(conditions(section))}</p>',
        heads["results"],
    ]
    alone = len(section.runs) == 1
    parts += [
        titled(table)
        for table in (
            [facts(section.runs[0]), chosen_keys(section.runs[0])] if alone else tables(section)
        )
    ]
    if not alone and section.best:
        parts += [f'<p class="soft">{escape(text)}</p>' for text in (HOW, TESTING)]
        parts += [f'<p class="note">{escape(text)}</p>' for text in caveats(section)]
    figures, constant = charts.measured_charts(section, looks, axis)
    measured = [(meaning(name), figure) for name, figure in figures.items()]
    parts += [heads["losses"], grid(loss_figures(section, looks, axis), section.title)]
    parts += [heads["training"], grid(measured, section.title)]
    parts += [f'<p class="soft">Constant, so not drawn: {escape(text)}</p>' for text in constant]
    parts += [heads["runs"], html(all_runs(section), beside)]
    return "\n".join(parts)


def loss_figures(
    section: Section, looks: dict[str, charts.Style], axis: str
) -> list[tuple[str, charts.Figure | None]]:
    """Returns the charts of losses with their captions."""
    alone = len(section.runs) == 1
    against = (
        {"step": "steps and tokens"}
        if alone
        else {"step": "steps and tokens", "flops": "training FLOPs", "seconds": "training time"}
    )
    best = "" if alone else " Settings that are best at equal steps; a dot is a seed."
    doubt = {
        "seconds": f" No evidence: {section.doubt.partition(':')[0]}." if section.doubt else ""
    }
    drawn = []
    for over, name in against.items():
        caption = (
            f"Validation loss against {name}.{best} The first fifth is cut"
            f" off.{doubt.get(over, '')}"
        )
        drawn.append((caption, charts.loss_chart(section, looks, over)))
    drawn.append(
        (
            (
                "Validation loss minus that of the baseline at the same step and seed (thin: each"
                " seed, thick: their mean)."
            ),
            charts.difference_chart(section, looks),
        )
    )
    drawn.append(
        (
            (
                "Training loss (clean). Rules of one pass, which see only the loss at the moved"
                " weights, have none."
            ),
            charts.training_chart(section, looks, axis),
        )
    )
    for key, other, name in (("rho", "learning rate", "radius"), ("lr", "radius", "learning rate")):
        told = f"Response to the {name}, each method at its best {other}; a dot is a seed."
        drawn.append((told, charts.response_chart(section, looks, key)))
    drawn.append(
        (
            "Final validation loss by learning rate and radius; x: a seed diverged.",
            charts.grid_chart(section),
        )
    )
    return drawn


def titled(table: Table) -> str:
    """A table under its caption, nothing where it has no rows."""
    return f"<h4>{escape(table.caption)}</h4>{html(table)}" if table.rows else ""


def items(texts: Iterable[str]) -> str:
    return "".join(f"<li>{escape(text)}</li>" for text in texts)


def grid(drawn: Iterable[tuple[str, charts.Figure | None]], name: str) -> str:
    """Returns charts with their captions, side by side where there is room."""
    figures = [
        f"<figure>{charts.svg(figure, f'{name} {caption}')}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, figure in drawn
        if figure
    ]
    return f'<div class="charts">{"".join(figures)}</div>'


def html(table: Table, beside: Path | None = None) -> str:
    """Returns a table in a box of its own that scrolls where it is too wide; its folders are linked
    from `beside`."""
    head = "".join(
        f"<th{aligned(table, column)}>{escape(text)}</th>"
        for column, text in enumerate(table.header)
    )
    rows = []
    for number, row in enumerate(table.rows):
        # one that waits has none
        there = table.folders and beside and table.folders[number].is_dir()
        link = quote(os.path.relpath(table.folders[number], beside)) if there else ""
        rows.append(
            "<tr>"
            + "".join(cell(table, column, text, link) for column, text in enumerate(row))
            + "</tr>"
        )
    return (
        f'<div class="box"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def cell(table: Table, column: int, text: str, link: str) -> str:
    """Returns a cell, the first with its link; names may break after _ and /, figures before their
    error."""
    if column:
        inner = re.sub("(?<=\u00b1) | (?=\\*$)", "\u00a0", escape(text))
    else:
        inner = re.sub("([_/])", r"\1<wbr>", escape(text))
        inner = f'<a href="{link}/">{inner}</a>' if link else inner
    return f"<td{aligned(table, column, text)}>{inner}</td>"


def aligned(table: Table, column: int, text: str = "") -> str:
    """The class of a cell: text stands to the left, and what is long may take several lines."""
    names = (
        ["text"] * (column in table.text)
        + ["long"] * (column in table.text and len(text) > 60)
        + ["wrap"] * (len(text) > 30)
    )
    return f' class="{" ".join(names)}"' if names else ""
