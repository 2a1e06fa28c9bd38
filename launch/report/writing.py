"""Writes the files of a report, or its one chart."""

import os
import time
from pathlib import Path

from data.files import write_result
from launch.report.charts import chart
from launch.report.comparison import compare
from launch.report.drawing import encoded, styles
from launch.report.exports import markdown, methods_csv, runs_csv
from launch.report.page import page
from launch.report.record import Record, read_runs
from launch.report.section import Section
from launch.report.settings import Selection
from launch.report.wording import headline, plural


def write_report(runs: list[Path], selection: Selection, out: Path, axis: str) -> str:
    """Writes the files of the report of some runs.

    Args:
        runs: the run folders
        selection: which of the runs choose settings, and which are reported
        out: the page, beside which the other files lie
        axis: what curves other than those of the validation loss are drawn against

    Returns:
        what won, which runs did not finish and where the report is, as text

    Raises:
        ValueError: for a file that cannot be written, and a selection that the runs do not allow
    """
    records = read_runs(runs)
    sections = compare(records, selection)
    made = time.strftime("%Y-%m-%d %H:%M")
    # The page comes last, so that the files that it stands beside are there.
    files: dict[Path, str | bytes] = {
        out.with_suffix(".md"): markdown(sections, records),
        out.with_suffix(".csv"): methods_csv(sections),
        out.with_name(f"{out.stem}_runs.csv"): runs_csv(sections, records),
        out: page(sections, records, made, axis, out.parent),
    }
    write_files(files, out)
    return summary(sections, records, f"report of {plural(len(records), 'run')}: {out}")


def write_chart(runs: list[Path], selection: Selection, out: Path, axis: str, name: str) -> str:
    """Writes one chart of the largest comparison of some runs.

    Args:
        runs: the run folders
        selection: which of the runs choose settings, and which are reported
        out: the file of the chart, a .png, .svg or .pdf
        axis: what the chart is drawn against, where it is one of curves
        name: of the chart

    Returns:
        what won, which runs did not finish and where the chart is, as text

    Raises:
        ValueError: for a file that cannot be written, a selection that the runs do not allow, and
            a chart that they do not have
    """
    records = read_runs(runs)
    sections = compare(records, selection)
    if not sections:
        raise ValueError(
            f"out={out}: no run has a configuration to draw anything of; give out=FILE.html, which"
            " lists them"
        )
    # The sections are ordered by their size.
    drawn = chart(sections[0], styles(sections[0].methods), name, axis)
    write_files({out: encoded(drawn, out.suffix)}, out)
    return summary(sections, records, f"{name} of {sections[0].title}: {out}")


def write_files(files: dict[Path, str | bytes], out: Path) -> None:
    """Writes files by their contents, each where its name leads if that is a link. Raises
    ValueError where one cannot be written."""
    # Everything was computed before the first file is written, so that a mistake leaves none.
    try:
        for path, content in files.items():
            write_result(Path(os.path.realpath(path)), content)
    except OSError as error:
        raise ValueError(
            f"out={out} cannot be written ({error.strerror}); name another place"
        ) from None


def summary(sections: list[Section], records: list[Record], written: str) -> str:
    """Returns what won, which runs did not finish and what was written, a line each."""
    lines = []
    for section in sections:
        lines.append(section.title)
        lines += [f"    {sentence}" for sentence in headline(section)]
    for run in records:
        if run.state != "finished":
            lines.append(f"{run.name}: {run.state} at step {run.step:,}; {run.reason}")
    return "\n".join([*lines, written])
