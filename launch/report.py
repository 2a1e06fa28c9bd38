"""Compares runs: python -m launch.report DIR... [out=FILE.html] [axis=step|tokens|flops|seconds]

DIR is a run's folder, or a folder that holds such folders at any depth. Beside the page, which needs no other file and no network, lie

    FILE.md           what won, the tables and the failures
    FILE.csv          validation loss of every method at equal steps, FLOPs and time, with the paired tests
    FILE_runs.csv     a row for every run
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from conf.schema import key


@dataclass
class Options:
    """Compares runs: tables and plots in one HTML file that needs no network, with the same as Markdown and CSV beside it.

    python -m launch.report runs
    python -m launch.report runs/a runs/b out=comparison.html axis=flops
    """

    folders: list[str] = key([], "run folders, or folders that hold such at any depth", positional="DIR ...", path=True)
    out: str | None = key(None, "the page, an .html file; default report.html in the first folder", path=True)
    axis: str = key("step", "what curves other than those of the validation loss, which are drawn against all of these, are drawn against",
                    choices=("step", "tokens", "flops", "seconds"))  # fmt: skip


def main(arguments: list[str]) -> None:
    """Writes the report of the runs in some folders, and prints what won."""
    from launch.config import parse, user_errors
    from launch.record import find_runs

    with user_errors():
        options, _ = parse(Options, arguments)
        folders = [Path(folder) for folder in options.folders]
        if not folders:
            raise ValueError("no folder given; python -m launch.report DIR [DIR ...] [out=FILE.html]")
        runs = list(find_runs(folders))
        if not runs:
            raise ValueError(f"{', '.join(map(str, folders))}: no run in there; a run's folder holds config.yaml and metrics.jsonl")
        out = Path(options.out or folders[0] / "report.html")
        if out.suffix != ".html" or out.is_dir() or not out.parent.is_dir():
            raise ValueError(f"out={out} cannot be written; name an .html file in a folder that exists")
        print(write(runs, out, options.axis))


def write(runs: list[Path], out: Path, axis: str) -> str:
    """Writes the files of the report; returns what won and where it is told, as text.

    Raises ValueError where a file cannot be written, and without what draws charts."""
    try:
        from launch import comparison, page
    except ModuleNotFoundError as error:
        raise ValueError(f"the report needs {error.name}, which is not installed; pip install -e '.[report]'") from None
    from data.files import write_atomically
    from launch.record import read_run

    records = [read_run(run) for run in runs]
    sections = comparison.compare(records)
    texts = {
        out.with_suffix(".md"): page.markdown(sections, records),
        out.with_suffix(".csv"): page.methods_csv(sections),
        out.with_name(f"{out.stem}_runs.csv"): page.runs_csv(sections, records),
        out: page.page(sections, records, time.strftime("%Y-%m-%d %H:%M"), axis),
    }
    try:
        for path, text in texts.items():
            write_atomically(path, text)
    except OSError as error:
        raise ValueError(f"out={out} cannot be written ({error.strerror}); name another place") from None
    unfinished = [f"{run.folder}: {run.state} at step {run.step:,}; {run.reason}" for run in records if run.state != "finished"]
    told = [line for section in sections for line in (section.title, *(f"    {sentence}" for sentence in page.winners(section)))]
    return "\n".join([*told, *unfinished, f"report of {len(records)} runs: {out}"])


if __name__ == "__main__":
    main(sys.argv[1:])
