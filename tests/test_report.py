"""Reports of real runs: their numbers against independent ones, their failures, and the page itself."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from conf.schema import LauncherConfig
from launch import charts, comparison
from launch.jobs import Job, write_jobs
from launch.lock import RunLock
from launch.record import SAMPLED, find_runs, read_run
from launch.report import main
from tests.runs import Server
from tests.test_folder import reseal

SEEDS = (0, 1, 2)
RUNS = {  # name: overrides
    **{f"adamw-{seed}": ["optim.lr=0.01", f"seed={seed}"] for seed in SEEDS},
    "adamw-slow-0": ["optim.lr=0.003", "seed=0"],
    **{f"sam-{seed}": ["optim=sam", "optim.lr=0.01", f"seed={seed}"] for seed in SEEDS},
    "sam-wide-0": ["optim=sam", "optim.lr=0.01", "optim.rho=0.5", "seed=0"],
    **{f"matched-{seed}": ["optim=sam", "optim.lr=0.01", "optim.compute_matched=true", f"seed={seed}"] for seed in (0, 1)},
    "diverged": ["optim.lr=1e30", "optim.clip=null", "max_skipped=3", "tracking.every=1"],
    "stopped": ["optim=sam", "optim.lr=0.01", "optim.rho=0.5", "seed=1", "minutes=0.00001"],
}


@pytest.fixture(scope="module")
def sweep(tiny, tmp_path_factory):
    """A folder of real runs, two of which do not finish, and one that a sweep could not start."""
    folder, output = tmp_path_factory.mktemp("sweep"), tmp_path_factory.mktemp("output") / "output"
    server = Server()
    common = [*tiny, "schedule.steps=40", "evaluation.every=4", "tracking.every=20"]
    jobs = {name: Job(folder / name, [], str(folder), 40, 1, LauncherConfig()) for name in ("stopped", "nowhere", "waiting")}
    write_jobs(folder, jobs.values())
    codes = {}
    for name, overrides in (RUNS | {"nowhere": ["data.path=nowhere"]}).items():
        if name in jobs:
            jobs[name].expect()
        started = server.start(*common, *overrides, f"dir={folder}/{name}", output=jobs[name].log() if name in jobs else output)
        codes[name] = started.wait()
        if name in jobs:
            jobs[name].ended(codes[name])
    server.close()
    assert codes == dict.fromkeys(RUNS, 0) | {"diverged": 3, "stopped": 75, "nowhere": 2}
    return folder


@pytest.fixture(scope="module")
def report(sweep, tmp_path_factory):
    """The report of that folder: what was printed is in out.txt."""
    folder = tmp_path_factory.mktemp("report")
    with (folder / "out.txt").open("w") as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        main([str(sweep), f"out={folder}/page.html"])
    return folder


@pytest.fixture
def copied(sweep, tmp_path):
    """Copies a run of the sweep, with other texts in its config.yaml and other values in its summary.json."""

    def copy(name: str, target: str, *texts: tuple[str, str], **values) -> Path:
        run = tmp_path / "runs" / target
        shutil.copytree(sweep / name, run)
        config = (run / "config.yaml").read_text()
        for old, new in texts:
            assert old in config
            config = config.replace(old, new)
        (run / "config.yaml").write_text(config)
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {key.replace("_", "/"): value for key, value in values.items()}))
        return run

    return copy


def section_of(folder: Path) -> comparison.Section:
    """The one comparison of a folder."""
    (section,) = comparison.compare([read_run(run) for run in find_runs([folder])])
    return section


def evaluations(run: Path, figure: str) -> tuple[list, list]:
    """The evaluations of a run over a figure, read the slow way."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get("val/loss") is not None]
    return [row[figure] for row in rows], [row["val/loss"] for row in rows]


def between(x: list, y: list, at: float) -> float:
    """The straight line between the two points around `at`."""
    after = next(index for index, value in enumerate(x) if value >= at)
    share = (at - x[after - 1]) / (x[after] - x[after - 1])
    return y[after - 1] + share * (y[after] - y[after - 1])


# Numbers


def test_means_and_tests_of_real_runs_against_independent_ones(sweep, report):
    """Mean, standard error, interpolation, and the paired test, whose p has a closed form for three pairs: 1 - |t| / sqrt(2 + t^2)."""
    rows = {(row["method"], row["at_equal"]): row for row in csv.DictReader((report / "page.csv").open())}
    assert {method for method, _ in rows} == {"adamw", "sam", "sam compute_matched=true"}
    summaries = {name: json.loads((sweep / name / "summary.json").read_text()) for name in RUNS if (sweep / name / "summary.json").exists()}
    final = {name: summary["val/loss"] for name, summary in summaries.items()}
    assert final["adamw-slow-0"] > np.mean([final[f"adamw-{seed}"] for seed in SEEDS])  # so it is not the best
    assert final["sam-wide-0"] > np.mean([final[f"sam-{seed}"] for seed in SEEDS])
    compared = [f"adamw-{seed}" for seed in SEEDS] + [f"sam-{seed}" for seed in SEEDS] + ["matched-0", "matched-1"]
    for at, figure in (("steps", "step"), ("flops", "flops"), ("seconds", "seconds")):
        budget = 40 if at == "steps" else min(summaries[name][figure] for name in compared)
        assert float(rows["sam", at]["budget"]) == budget
        read = {}
        for name in compared:
            end = summaries[name][figure]
            at_end = end == budget if at == "steps" else end <= 1.05 * budget
            if at_end or end > budget:
                read[name] = final[name] if at_end else between(*evaluations(sweep / name, figure), budget)
        for method, name, seeds in (("adamw", "adamw", SEEDS), ("sam", "sam", SEEDS), ("sam compute_matched=true", "matched", (0, 1))):
            row, values = rows[method, at], [read[f"{name}-{seed}"] for seed in seeds if f"{name}-{seed}" in read]
            assert int(row["seeds"]) == len(values)
            if values:
                mean = sum(values) / len(values)
                variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
                assert float(row["mean"]) == pytest.approx(mean, rel=1e-9)
                assert float(row["standard_error"]) == pytest.approx(math.sqrt(variance / len(values)), rel=1e-6)
        differences = [read[f"sam-{seed}"] - read[f"adamw-{seed}"] for seed in SEEDS]
        t = np.mean(differences) / (np.std(differences, ddof=1) / math.sqrt(3))
        tested = {key: float(rows["sam", at][key]) for key in ("pairs", "mean_difference", "t", "p")}
        expected = {"pairs": 3, "mean_difference": np.mean(differences), "t": t, "p": 1 - abs(t) / math.sqrt(2 + t * t)}
        assert tested == pytest.approx(expected, rel=1e-6)
        assert rows["adamw", at]["t"] == ""


def test_a_compute_matched_run_counts_at_its_own_end(sweep, report):
    """It ends about where AdamW does in FLOPs, far before it in steps; whole SAM runs are read midway, and the page says so."""
    rows = {(row["method"], row["at_equal"]): row for row in csv.DictReader((report / "page.csv").open())}
    matched = rows["sam compute_matched=true", "flops"]
    finals = [json.loads((sweep / f"matched-{seed}" / "summary.json").read_text())["val/loss"] for seed in (0, 1)]
    assert float(matched["mean"]) == pytest.approx(np.mean(finals), rel=1e-12)
    assert [rows[method, "flops"]["midway"] for method in ("adamw", "sam", "sam compute_matched=true")] == ["False", "True", "False"]
    assert rows["sam compute_matched=true", "steps"]["seeds"] == "0"
    assert "the rate is not annealed there yet" in (report / "page.html").read_text()


@pytest.mark.filterwarnings("error")
def test_few_pairs_and_equal_differences_give_no_test():
    assert math.isnan(comparison.paired_test([3.0], [3.1]).p)
    same = comparison.paired_test([3.0, 3.5], [3.1, 3.6])
    assert same.difference.mean == pytest.approx(-0.1) and math.isnan(same.t) and math.isnan(same.p)
    one = comparison.paired_test([3.0, 3.2], [3.1, 3.5])  # one degree of freedom: Cauchy's distribution
    assert one.p == pytest.approx(1 - 2 / math.pi * math.atan(abs(one.t)), rel=1e-9)


def test_a_setting_of_which_a_seed_diverged_is_not_the_best(copied, tmp_path):
    copied("adamw-0", "calm", val_loss=3.0)
    copied("adamw-0", "wild-0", ("lr: 0.01", "lr: 0.02"), val_loss=2.0)
    copied("adamw-0", "wild-1", ("lr: 0.01", "lr: 0.02"), ("\nseed: 0", "\nseed: 1"), val_loss=None)
    section = section_of(tmp_path)
    assert section.best["adamw"].lr == 0.01 and section.best["adamw"].final.mean == 3.0
    assert [setting.diverged for setting in section.methods["adamw"]] == [False, True]


def test_only_like_is_compared_with_like(copied, tmp_path):
    """Another batch is another comparison; another weight decay a variant; another validation set or machine a warning; a repeated run is named."""
    copied("adamw-0", "one")
    copied("sam-0", "sam", ("tokens: 512", "tokens: 256"))
    copied("sam-1", "decayed", ("weight_decay: 0.1", "weight_decay: 0.2"))
    copied("adamw-0", "repeated")
    environment = tmp_path / "runs/sam/code/environment.json"
    environment.write_text(json.dumps([json.loads(environment.read_text())[-1] | {"devices": ["NVIDIA H200"]}]))
    reseal(tmp_path / "runs/sam/checkpoints/step_00000040", lambda state: state.update(data="0123456789abcdef"))
    section = section_of(tmp_path)
    assert list(section.methods) == ["adamw", "sam", "sam weight_decay=0.2"]
    notes = "\n".join(section.notes)
    for text in ("evaluation.tokens differs", "the data themselves differ", "different machines", "NVIDIA H200", "runs/repeated repeats"):
        assert text in notes
    copied("adamw-0", "large", ("sequences: 4", "sequences: 8"))
    sections = comparison.compare([read_run(run) for run in find_runs([tmp_path])])
    assert [(len(section.runs), section.title.partition("steps, ")[2]) for section in sections] == [
        (4, "batch.sequences=4"),
        (1, "batch.sequences=8"),
    ]


def test_a_late_run_is_compared_with_whole_ones(copied, tmp_path):
    """Where it branched off is a variant. Keys that a run does not read are in no name."""
    copied("adamw-0", "whole")
    for step in (10, 20):
        start = (f"  run: {tmp_path}/runs/whole\n  step: {step}\n", "  optimizer: true")
        copied("sam-0", f"late-{step}", ("init:\n  run: null\n  step: null\n", f"init:\n{start[0]}"), ("  optimizer: false", start[1]))
    copied("sam-0", "sgd", ("  base: adamw", "  base: sgd"))
    copied("sam-0", "weights", ("init:\n  run: null\n  step: null\n", f"init:\n  run: {tmp_path}/runs/whole\n  step: 10\n"))
    whole, apart = comparison.compare([read_run(run) for run in find_runs([tmp_path])])
    assert set(whole.methods) == {"adamw", "sam base=sgd", "sam init.step=10 init.optimizer=true", "sam init.step=20 init.optimizer=true"}
    assert list(apart.methods) == ["sam"]


# Reading


def test_long_files_are_sampled(copied, tmp_path):
    """Every evaluation is read, of the other rows a sample; what a crash cut short is left out."""
    run = copied("sam-0", "long")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    plain = next(row for row in rows if row["step"] == 20)
    lines = [{**plain, "step": step, "val/loss": 9 - step / 1000} if step % 70 == 0 else {"step": step, "train/loss": 4.0} for step in range(5001)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5001, "tr')
    record = read_run(run)
    steps, losses = record.curve("step", "val/loss")
    assert steps.tolist() == list(range(0, 5001, 70)) and losses.tolist() == [9 - step / 1000 for step in range(0, 5001, 70)]
    assert 0.5 * SAMPLED < len(record.columns["step"]) <= SAMPLED + 72 + 1 and record.columns["step"][-1] == 5000
    lines = (run / "metrics.jsonl").read_text().split("\n")
    assert 2 not in record.columns["step"]
    (run / "metrics.jsonl").write_text("\n".join([*lines[:2], lines[2][:-4], *lines[3:]]))
    assert read_run(run).state == "damaged" and "line 3," in read_run(run).reason  # though it is not read


DAMAGES = [
    ("metrics.jsonl", '{"step": 20,', '{"step": 20, \0', "metrics.jsonl, line 6, is damaged"),
    ("metrics.jsonl", '{"step": 20,', '{"st', "metrics.jsonl, line 6, is damaged"),
    ("metrics.jsonl", '"tokens": 2560,', '"tokens": "many",', "metrics.jsonl, line 6, is damaged (tokens is no number)"),
    ("summary.json", "{", "", "summary.json is damaged"),
    ("summary.json", '"flops"', '"flop"', "summary.json is damaged (Object missing required field flops)"),
    ("config.yaml", "seed: 0", "seed: [", "config.yaml is damaged"),
    ("config.yaml", "model:\n", "model: 3\nothers:\n", "config.yaml is damaged"),
]


def test_damaged_files_are_named_and_the_other_runs_are_reported(copied, tmp_path, capsys):
    copied("adamw-0", "good")
    for number, (file, old, new, _) in enumerate(DAMAGES):
        path = copied("adamw-0", f"bad-{number}") / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
    main([str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    for number, (*_, told) in enumerate(DAMAGES):
        (line,) = [line for line in printed if line.startswith(f"{tmp_path}/runs/bad-{number}: damaged at ")]
        assert f"bad-{number}/{told}" in line
    assert "1 finished, 7 not" in (tmp_path / "report.html").read_text()
    states = [row["state"] for row in csv.DictReader((tmp_path / "report_runs.csv").open())]
    assert states == ["damaged"] * len(DAMAGES) + ["finished"]


def test_what_did_not_finish_is_listed_with_its_reason(sweep, report):
    states = {Path(row["run"]).name: (row["state"], row["reason"]) for row in csv.DictReader((report / "page_runs.csv").open())}
    assert {name for name, (state, _) in states.items() if state == "finished"} == RUNS.keys() - {"diverged", "stopped"}
    assert states["diverged"][0] == "diverged" and "not finite" in states["diverged"][1]
    assert states["stopped"][0] == "stopped" and "time limit: saved step" in states["stopped"][1]
    assert states["waiting"] == ("waiting", "")
    assert states["nowhere"][0] == "crashed" and states["nowhere"][1].startswith("error: data.path=nowhere matches no file")
    for file in ("page.html", "page.md", "out.txt"):
        text = (report / file).read_text().replace("<wbr>", "")
        assert all(f"{sweep}/{name}" in text for name in ("diverged", "stopped", "waiting", "nowhere"))
        assert "matches no file" in text


def test_a_run_under_way_and_a_killed_one(sweep, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(sweep / "stopped", run)
    with RunLock(run):
        held = (run / "lock").read_text()
        assert read_run(run).state == "running"
    assert read_run(run).state == "stopped" and "in order" in read_run(run).reason
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    (run / "lock").write_text(json.dumps(json.loads(held) | {"pid": int(ended.stdout)}))
    assert read_run(run).state == "stopped" and f"killed: process {int(ended.stdout)} on " in read_run(run).reason


def test_runs_are_found_once_and_only_where_they_are(sweep, tmp_path):
    """Links lead to runs too, a folder with a config.yaml of another kind is none, and what lies inside a run is its own business."""
    (tmp_path / "links").mkdir()
    (tmp_path / "links/again").symlink_to(sweep / "sam-0")
    for loop in "ab":
        (tmp_path / "links" / loop).symlink_to(tmp_path)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/config.yaml").write_text("defaults: []\n")
    found = list(find_runs([tmp_path, sweep]))
    assert sorted(run.name for run in found) == sorted(["again", "nowhere", "waiting", *(name for name in RUNS if name != "sam-0")])


# The page


class Checked(HTMLParser):
    """Collects elements and attributes, and checks that every element is closed."""

    VOID = ("meta", "wbr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open += [tag] if tag not in self.VOID else []

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_else(report):
    """No script, no resource but what stands in the page itself, every reference has its target, and no target has two meanings."""
    page = (report / "page.html").read_text()
    checked = Checked(page)
    assert checked.open == []
    assert not {"script", "link", "img", "iframe", "object", "image"} & {tag for tag, _ in checked.elements}
    attributes = [(name, value) for _, found in checked.elements for name, value in found.items()]
    ids = [value for name, value in attributes if name == "id"]
    references = [value for name, value in attributes if name in ("href", "xlink:href", "src")] + re.findall(r"url\((.*?)\)", page)
    assert len(ids) == len(set(ids))
    assert references and all(value.startswith("#") for value in references)
    assert {value[1:] for value in references} <= set(ids)
    assert "@import" not in page
    assert not re.search(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", page))
    assert ("name", "viewport") in attributes and "prefers-color-scheme: dark" in page
    assert "details::details-content { content-visibility: visible; }" in page.partition("@media print")[2]  # closed on the screen, all on paper


def test_charts_are_real(report):
    """Loss against steps, FLOPs and time, both responses and what rows measured; each with units and a legend."""
    page = (report / "page.html").read_text()
    figures = re.findall(r"<figure>(.*?)</figure>", page, re.DOTALL)
    for label in ("steps", "tokens (10^3)", "training FLOPs", "training time (seconds", "training loss (nats per token)", "radius rho",
                  "peak learning rate", "sharpness/gap", "grad/norm", "perf/tokens_per_second"):  # fmt: skip
        assert any(f">{label}" in figure for figure in figures), label
    assert all(">sam<" in figure or ">adamw<" in figure for figure in figures)
    assert all('width="' not in figure.split(">")[0] and "viewBox" in figure for figure in figures)
    loss = Checked(figures[0])
    assert {"adamw", "sam", "sam compute_matched=true"} <= set(re.findall(r">([^<>]+)</text>", figures[0])) and loss.open == []


def test_methods_look_different_and_the_same_everywhere():
    names = ["adamw", "adamw weight_decay=0.2", *(f"method_{number:02}" for number in range(16))]
    looks = charts.styles(name for name in names)
    assert len({(look.color, look.dash) for look in looks.values()}) == len(names)
    assert len({looks[f"method_{number:02}"].color for number in range(10)} | {looks["adamw"].color}) == 11
    assert charts.styles(reversed(names)) == looks and looks["adamw"].color == charts.INK


def test_error_bands_stay_in_the_axes():
    """Of the last four fifths; the fall before is cut off."""
    x, means = np.arange(11.0), np.array([9.0, 8.0, *np.linspace(3, 2, 9)])
    _figure, axes = charts.start()
    charts.frame_late(axes, [("sam", x, means, np.where(x == 10, 0.7, np.nan)), ("adamw", x, means + 0.1, np.full(11, 0.2))])
    low, high = axes.get_ylim()
    assert low < 2 - 0.7 < low + 0.2 and 3 + 0.1 + 0.2 < high < 3.5


@pytest.mark.parametrize(
    ("axis", "label"), [("step", "steps"), ("tokens", "tokens"), ("flops", "training FLOPs"), ("seconds", "training time")], ids=str
)
def test_every_figure_is_drawn_against_what_is_asked_for(sweep, axis, label):
    """With the values of that axis in its rows: the longest run ends at the right edge."""
    section = section_of(sweep)
    looks = charts.styles(section.methods)
    drawn = [charts.training_chart(section, looks, axis), *charts.measured_charts(section, looks, axis).values()]
    assert len(drawn) > 5 and all(re.search(f">{label}[^<>]*</text>", chart) for chart in drawn)
    lines, unit = charts.in_units([charts.averaged("sam", section.best["sam"].runs, axis, "train/loss")], axis)
    last = [run.columns[axis][-1] for run in section.best["sam"].runs]
    scale = float(unit.split("(10^")[1].rstrip(")")) if "10^" in unit else 0
    if axis != "seconds":
        assert lines[0][1][-1] * 10**scale == pytest.approx(sum(last) / len(last), rel=0.2)


def test_digits_of_rounding_fill_no_axis(sweep):
    section = section_of(sweep)
    for run in (run for method, setting in section.best.items() if method != "adamw" for run in setting.runs):
        run.columns["sharpness/realised_radius"] = 0.05 + 1e-8 * run.columns["step"]
    drawn = charts.measured_charts(section, charts.styles(section.methods))[charts.MEANINGS["sharpness/realised_radius"]]
    ticks = [text.replace("\u2212", "-") for text in re.findall(r">([^<>]+)</text>", drawn)]
    assert {"0.048", "0.052"} <= set(ticks) and not any("e-" in text for text in ticks)


def test_the_losses_come_first_in_the_table(report):
    """On a telephone the rest is beyond the edge."""
    header = next(line for line in (report / "page.md").read_text().splitlines() if line.startswith("| method | equal"))
    columns = [re.split("[:,] ", text)[0] for text in header.strip("| ").split(" | ")]
    assert columns == ["method", "equal steps", "equal FLOPs", "equal time", "best lr", "best rho", "settings", "n", "n", "n"]


def test_names_are_escaped(copied, tmp_path):
    """Whoever names a run or a corpus writes no HTML, no row of a table and no formula."""
    copied("sam-0", '<b onclick="x">&|$', ("name: sam\n", "name: <i>$x^2$|</i>\n"), ("  name: text\n", '  name: "<script>|"\n'))
    main([str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    checked = Checked(page)
    assert checked.open == [] and not {"script", "b", "i"} & {tag for tag, _ in checked.elements}
    assert '<b onclick="x">&|$' in checked.text and "<i>$x^2$|</i>" in checked.text
    assert re.search(r"<text[^>]*>&lt;i&gt;\$x\^2\$\|&lt;/i&gt;</text>", page)
    assert re.search(r"^\| <i>\$x\^2\$\\\|</i> \|", (tmp_path / "report.md").read_text(), re.MULTILINE)


def test_one_run_is_a_report_too(sweep, tmp_path, capsys):
    main([str(sweep / "adamw-0"), f"out={tmp_path}/one.html"])
    assert "There is no other method to compare" in capsys.readouterr().out
    assert "1 run compared" in (tmp_path / "one.html").read_text()


def test_a_run_that_lost_its_rows_still_counts_at_its_end(copied, tmp_path, capsys):
    """Its summary tells the final loss; where it would have to be read midway, it is left out."""
    copied("adamw-0", "whole")
    (copied("sam-0", "bare", val_loss=2.5) / "metrics.jsonl").unlink()
    main([str(tmp_path)])
    rows = {(row["method"], row["at_equal"]): row for row in csv.DictReader((tmp_path / "report.csv").open())}
    assert rows["sam", "steps"]["mean"] == "2.5" and rows["sam", "flops"]["seeds"] == "0"


def test_a_folder_without_a_finished_run_is_a_report_too(sweep, tmp_path, capsys):
    main([str(sweep / "stopped"), str(sweep / "diverged"), f"out={tmp_path}/none.html"])
    assert "No run is finished yet" in capsys.readouterr().out
    assert "0 finished, 2 not" in (tmp_path / "none.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no folder given"),
        (["nowhere"], "nowhere is no folder"),
        (["."], "no run in there"),
        ([".", "output=x"], "output=x: no such option; did you mean out=?"),
        (["RUN", "out=x.pdf"], "out=x.pdf cannot be written; name an .html file"),
        (["RUN", "out=nowhere/x.html"], "out=nowhere/x.html cannot be written; name an .html file in a folder"),
    ],
)
def test_mistakes_cost_one_line(sweep, tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([argument.replace("RUN", str(sweep / "adamw-0")) for argument in arguments])
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and errors.startswith("error: ") and told in errors and errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_it_says_what_to_install(sweep, monkeypatch, capsys):
    for name in ("page", "charts"):
        monkeypatch.delitem(sys.modules, f"launch.{name}", raising=False)
        monkeypatch.delattr(f"launch.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        main([str(sweep)])
    assert "matplotlib" in (told := capsys.readouterr().err) and "pip install" in told
    assert not (sweep / "report.html").exists()
