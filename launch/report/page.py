"""Fills the page of a report, whose layout is page.html and whose style is report.css."""

import os
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from launch.report.charts import Captioned, charts_of_losses, charts_while_training
from launch.report.drawing import Style, styles, svg
from launch.report.record import Record
from launch.report.section import Section
from launch.report.tables import Table, result_tables, runs_table, unfinished_table
from launch.report.wording import HOW, TESTING, caveats, conditions, plural, winners

FOLDER = Path(__file__).parent
PAGES = Environment(
    loader=FileSystemLoader(FOLDER),
    autoescape=True,
    # A name that page.html misspells is an error, and not an empty text.
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
# The parts of a comparison, by the ends of their targets.
PARTS = {
    "results": "Results",
    "losses": "Loss",
    "training": "Sharpness, gradient and speed while training",
    "runs": "Runs",
}
# Texts of more characters than these may take several lines; the columns of text are the wider.
WRAPPED = 30
LONG = 60


class Cell(NamedTuple):
    """A cell of a table on the page: its text, the classes of its element, and where it leads."""

    text: str
    classes: str
    link: str = ""


class Cells(NamedTuple):
    """A table on the page."""

    caption: str
    head: list[Cell]
    rows: list[list[Cell]]


class Picture(NamedTuple):
    """A chart on the page."""

    svg: Markup
    caption: str


class Part(NamedTuple):
    """A comparison on the page.

    title       of the comparison
    conditions  what all its runs share
    winners     what won, a sentence each
    caveats     what is to be said against the figures
    compares    whether it compares methods, which has to be explained
    tables      its results
    losses      the charts of losses
    training    the charts of what was measured while training
    constant    figures that never changed
    runs        all its runs
    """

    title: str
    conditions: str
    winners: list[str]
    caveats: list[str]
    compares: bool
    tables: list[Cells]
    losses: list[Picture]
    training: list[Picture]
    constant: list[str]
    runs: Cells


def page(sections: list[Section], records: list[Record], made: str, axis: str, beside: Path) -> str:
    """Returns the whole report as one HTML document.

    Args:
        sections: the comparisons
        records: all runs
        made: when
        axis: what other curves than those of the validation loss are drawn against
        beside: the folder of the page, from which links lead to runs
    """
    looks = styles(method for section in sections for method in section.methods)
    failures = unfinished_table(records)
    return PAGES.get_template("page.html").render(
        style=Markup((FOLDER / "report.css").read_text(encoding="utf-8")),
        runs=plural(len(records), "run"),
        comparisons=plural(len(sections), "comparison"),
        made=made,
        finished=len(records) - len(failures.rows),
        unfinished=len(failures.rows),
        failures=cells_of(failures, beside),
        parts=PARTS,
        explanations=(HOW, TESTING),
        sections=[part_of(section, looks, axis, beside) for section in sections],
    )


def part_of(section: Section, looks: dict[str, Style], axis: str, beside: Path) -> Part:
    """Returns one comparison as the page shows it."""
    training, constant = charts_while_training(section, looks, axis)
    return Part(
        title=section.title,
        conditions=conditions(section),
        winners=winners(section),
        caveats=caveats(section),
        compares=bool(section.best) and len(section.runs) > 1,
        tables=[cells_of(table) for table in result_tables(section)],
        losses=pictures_of(charts_of_losses(section, looks, axis), section.title),
        training=pictures_of(training, section.title),
        constant=constant,
        runs=cells_of(runs_table(section), beside),
    )


def pictures_of(charts: Iterable[Captioned], name: str) -> list[Picture]:
    """Returns those charts that there are; `name` and their captions tell their targets apart."""
    # Markup is not escaped by the template: an SVG escapes its own texts.
    return [
        Picture(Markup(svg(figure, f"{name} {caption}")), caption)
        for caption, figure in charts
        if figure
    ]


def cells_of(table: Table, beside: Path | None = None) -> Cells:
    """Returns a table as the page shows it; its folders are linked from `beside`."""
    # A style of its own wraps the cells of the header, however long they are.
    head = [
        Cell(text, classes_of(column in table.text, length=0))
        for column, text in enumerate(table.header)
    ]
    rows = []
    for number, row in enumerate(table.rows):
        link = link_to(table.folders[number], beside) if table.folders and beside else ""
        rows.append([cell_of(table, column, text, link) for column, text in enumerate(row)])
    return Cells(table.caption, head, rows)


def link_to(folder: Path, beside: Path) -> str:
    """Returns the address of a run's folder on a page in the folder `beside`, empty for a run that
    waits and has none."""
    # As bytes, for the name of a folder may be no UTF-8.
    return f"{quote(os.fsencode(os.path.relpath(folder, beside)))}/" if folder.is_dir() else ""


def cell_of(table: Table, column: int, text: str, link: str) -> Cell:
    """Returns a cell, the first with its link; names may break after _ and /, figures before their
    error."""
    classes = classes_of(column in table.text, len(text))
    if column == 0:
        return Cell(Markup(re.sub("([_/])", r"\1<wbr>", escape(text))), classes, link)
    return Cell(re.sub("(?<=\u00b1) | (?=\\*$)", "\u00a0", text), classes)


def classes_of(is_text: bool, length: int) -> str:
    """Returns the classes of a cell: text stands to the left, and what is long may take several
    lines."""
    names = []
    if is_text:
        names.append("text")
    if is_text and length > LONG:
        names.append("long")
    if length > WRAPPED:
        names.append("wrap")
    return " ".join(names)
