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

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from conf.key import key

PICTURES = (".png", ".svg", ".pdf")
# The files beside a page, by the ends of their names, and how each begins.
BESIDE = {".md": b"## ", ".csv": b"comparison,", "_runs.csv": b"run,"}


@dataclass
class Options:
    """Compares runs in one HTML file that needs no network, with Markdown and CSV beside it.

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

    with user_errors():
        options, _ = parse(Options, arguments)
        # Imported only now, so that help and a mistyped option do not wait for torch.
        from launch.report.record import find_runs

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
        check_out(out, options)
        print(write(runs, out, options))


def check_out(out: Path, options: Options) -> None:
    """Raises ValueError for a file that cannot be written, for one chart on a page of all, and
    where a file that is no report's would be lost."""
    # A link is followed to the file that it names.
    place = Path(os.path.realpath(out))
    if out.suffix not in (".html", *PICTURES) or place.is_dir() or not place.parent.is_dir():
        raise ValueError(
            f"out={out} cannot be written; name an .html, .png, .svg or .pdf file in a folder"
            " that exists"
        )
    if options.chart and out.suffix == ".html":
        raise ValueError(
            f"chart={options.chart} is one chart, and out={out} holds all; give out=FILE.png,"
            " .svg or .pdf"
        )
    if out.suffix != ".html":
        return
    for ending, beginning in BESIDE.items():
        file = out.with_name(out.stem + ending)
        if file.is_file() and not begins_with(file, beginning):
            raise ValueError(
                f"out={out} would overwrite {file}, which is no report's; move that file, or give"
                " out= another name"
            )


def begins_with(file: Path, beginning: bytes) -> bool:
    """Returns whether a file begins so, as one that a report has written does; an empty one may
    be lost as well."""
    with file.open("rb") as opened:
        return opened.read(len(beginning)) in (beginning, b"")


def write(runs: list[Path], out: Path, options: Options) -> str:
    """Writes the report, or its one chart; returns what there is to print.

    Raises ValueError where a file cannot be written, for a chart or seeds that there are not, and
    without the packages that the report needs."""
    # Matplotlib, SciPy and Jinja2 come with the extra `report`, which may not be installed.
    try:
        from launch.report.settings import Selection
        from launch.report.writing import write_chart, write_report
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the report needs {error.name}, which is not installed; pip install -e '.[report]'"
        ) from None
    selection = Selection(read_seeds(options.select_seeds))
    if out.suffix in PICTURES:
        return write_chart(runs, selection, out, options.axis, options.chart or "loss")
    return write_report(runs, selection, out, options.axis)


def read_seeds(text: str | None) -> tuple[int, ...]:
    """Returns the seeds of a list such as 0,1. Raises ValueError for anything else."""
    if text is None:
        return ()
    if not re.fullmatch(r"\[?\d+(,\d+)*\]?", text):
        raise ValueError(f"select_seeds={text} is no list of seeds; write select_seeds=0,1")
    return tuple(sorted({int(seed) for seed in text.strip("[]").split(",")}))


if __name__ == "__main__":
    main(sys.argv[1:])
