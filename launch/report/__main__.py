"""Compares runs: python -m launch.report DIR... [out=FILE.html] [axis=step|tokens|flops|seconds]
[select_seeds=0,1]

DIR is a run's folder, or a folder that holds such folders at any depth. Beside the page, which
needs no other file and no network, lie

    FILE.md           what won, the tables and the failures
    FILE.csv          validation loss of every method at equal steps, FLOPs and time, with the
                      paired tests
    FILE_runs.csv     a row for every run

One chart for a paper, of the largest comparison:

    python -m launch.report DIR... out=FILE.png|svg|pdf
    [chart=loss|difference|training|rho|lr|grid|FIGURE] [axis=...]

The setting of a method is chosen on the seeds that are reported, which flatters those that tried
many, unless select_seeds names some to choose on (the others are reported), or the runs carry
roles: tracking.tags=['role=tune'] on those that choose, tracking.tags=['role=report'] on those
reported.
"""

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.key import key

PICTURES = (".png", ".svg", ".pdf")


@dataclass
class Options:
    """Compares runs: tables and plots in one HTML file that needs no network, with the same as
    Markdown and CSV beside it.

    python -m launch.report runs
    python -m launch.report runs/a runs/b out=comparison.html axis=flops
    """

    folders: list[str] = key(
        [], "run folders, or folders that hold such at any depth", positional="DIR ...", path=True
    )
    out: str | None = key(
        None,
        "page, an .html file, default report.html in the first folder; or one chart, .png, .svg or"
        " .pdf",
        path=True,
    )
    axis: str = key(
        "step",
        "what curves other than those of the validation loss, which are drawn against all of these,"
        " and the one chart are drawn against",
        choices=("step", "tokens", "flops", "seconds"),
    )
    chart: str | None = key(
        None,
        "the one chart: loss, difference, training, rho, lr, grid, or a figure such as"
        " sharpness/gap; default loss",
    )
    select_seeds: str | None = key(
        None,
        "seeds on which the setting of each method is chosen, such as 0,1; the other seeds are"
        " reported. Default: all choose and are reported, but for runs with the tags role=tune and"
        " role=report",
    )


def main(arguments: list[str]) -> None:
    """Writes the report of the runs in some folders, and prints what won."""
    from conf.cli import parse, user_errors
    from launch.report.record import find_runs

    with user_errors():
        options, _ = parse(Options, arguments)
        folders = [Path(folder) for folder in options.folders]
        if not folders:
            raise ValueError(
                "no folder given; python -m launch.report DIR [DIR ...] [out=FILE.html]"
            )
        runs = list(find_runs(folders))
        if not runs:
            raise ValueError(
                f"{', '.join(map(str, folders))}: no run in there; a run's folder holds config.yaml"
                " and metrics.jsonl"
            )
        out = Path(options.out or folders[0] / "report.html")
        if out.suffix not in (".html", *PICTURES) or out.is_dir() or not out.parent.is_dir():
            raise ValueError(
                f"out={out} cannot be written; name an .html, .png, .svg or .pdf file in a folder"
                " that exists"
            )
        if options.chart and out.suffix == ".html":
            raise ValueError(
                f"chart={options.chart} is one chart, and out={out} holds all; give out=FILE.png,"
                " .svg or .pdf"
            )
        print(write(runs, out, options))


def write(runs: list[Path], out: Path, options: Options) -> str:
    """Writes the files of the report, or its one chart; returns what won and where it is told, as
    text.

    Raises ValueError where a file cannot be written, for a chart or seeds that there are not, and
    without what draws charts."""
    try:
        from launch.report import comparison, exports, page, tables
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the report needs {error.name}, which is not installed; pip install -e '.[report]'"
        ) from None
    from data.files import write_result
    from launch.report.record import read_run

    records = [read_run(run) for run in runs]
    sections = comparison.compare(records, comparison.Selection(read_seeds(options.select_seeds)))
    files: dict[Path, Any]
    if out.suffix in PICTURES:
        files = {out: one_chart(sections, out, options)}
        last = f"{options.chart or 'loss'} of {sections[0].title}: {out}"
    else:
        files = {
            out.with_suffix(".md"): exports.markdown(sections, records),
            out.with_suffix(".csv"): exports.methods_csv(sections),
            out.with_name(f"{out.stem}_runs.csv"): exports.runs_csv(sections, records),
            out: page.page(
                sections, records, time.strftime("%Y-%m-%d %H:%M"), options.axis, out.parent
            ),
        }
        last = f"report of {tables.plural(len(records), 'run')}: {out}"
    try:
        for path, content in files.items():
            write_result(path, content)
    except OSError as error:
        raise ValueError(
            f"out={out} cannot be written ({error.strerror}); name another place"
        ) from None
    unfinished = [
        f"{run.folder}: {run.state} at step {run.step:,}; {run.reason}"
        for run in records
        if run.state != "finished"
    ]
    told = [
        line
        for section in sections
        for line in (section.title, *(f"    {sentence}" for sentence in tables.headline(section)))
    ]
    return "\n".join([*told, *unfinished, last])


def one_chart(sections: list[Any], out: Path, options: Options) -> bytes:
    """Returns the one chart of the largest comparison, as the content of its file."""
    from launch.report import charts

    if not sections:
        raise ValueError(
            f"out={out}: no run has a configuration to draw anything of; give out=FILE.html, which"
            " lists them"
        )
    drawn = charts.chart(
        sections[0], charts.styles(sections[0].methods), options.chart or "loss", options.axis
    )
    return charts.encoded(drawn, out.suffix)


def read_seeds(text: str | None) -> tuple[int, ...]:
    """Returns the seeds of a list such as 0,1. Raises ValueError for anything else."""
    if text is None:
        return ()
    if not re.fullmatch(r"\[?\d+(,\d+)*\]?", text):
        raise ValueError(f"select_seeds={text} is no list of seeds; write select_seeds=0,1")
    return tuple(sorted({int(seed) for seed in text.strip("[]").split(",")}))


if __name__ == "__main__":
    main(sys.argv[1:])
