"""Reports of real runs: their numbers against independent ones, their failures, and the page
itself."""

import csv
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import yaml

from conf.launcher import LauncherConfig
from launch.report import (
    drawing,
    estimates,
    exports,
    line_charts,
    meanings,
    response_charts,
    tables,
    wording,
)
from launch.report.__main__ import main
from launch.report.comparison import compare
from launch.report.record import SAMPLED, find_runs, read_run
from launch.report.section import AXES, Section
from launch.report.settings import Selection
from launch.run.lock import RunLock
from launch.sweep.jobs import Job, write_jobs
from tests.runs import ROOT, Server
from tests.test_folder import reseal

SEEDS = (0, 1, 2)
RUNS = {  # name: overrides
    **{f"adamw-{seed}": ["optim.lr=0.01", f"seed={seed}"] for seed in SEEDS},
    "adamw-slow-0": ["optim.lr=0.003", "seed=0"],
    **{f"sam-{seed}": ["optim=sam", "optim.lr=0.01", f"seed={seed}"] for seed in SEEDS},
    "sam-wide-0": ["optim=sam", "optim.lr=0.01", "optim.rho=0.5", "seed=0"],
    **{
        f"matched-{seed}": [
            "optim=sam",
            "optim.lr=0.01",
            "optim.compute_matched=true",
            f"seed={seed}",
        ]
        for seed in (0, 1)
    },
    "diverged": ["optim.lr=1e6", "optim.clip=null", "max_skipped=3", "tracking.every=1"],
    "stopped": ["optim=sam", "optim.lr=0.01", "optim.rho=0.5", "seed=1", "minutes=0.00001"],
}


@pytest.fixture(scope="module")
def sweep(tiny, tmp_path_factory):
    """Makes a folder of real runs, two of which do not finish, and one that a sweep could not
    start."""
    folder, output = tmp_path_factory.mktemp("sweep"), tmp_path_factory.mktemp("output") / "output"
    server = Server()
    common = [*tiny, "schedule.steps=40", "evaluation.every=4", "tracking.every=20"]
    jobs = {
        name: Job(folder / name, [], str(folder), 40, 1, LauncherConfig())
        for name in ("stopped", "nowhere", "waiting")
    }
    write_jobs(folder, jobs.values())
    codes = {}
    for name, overrides in (RUNS | {"nowhere": ["data.path=nowhere"]}).items():
        if name in jobs:
            jobs[name].expect()
        started = server.start(
            *common,
            *overrides,
            f"dir={folder}/{name}",
            output=jobs[name].log() if name in jobs else output,
        )
        codes[name] = started.wait()
        if name in jobs:
            jobs[name].ended(codes[name])
    server.close()
    assert codes == dict.fromkeys(RUNS, 0) | {"diverged": 3, "stopped": 75, "nowhere": 2}
    return folder


@pytest.fixture(scope="module")
def report(sweep, tmp_path_factory):
    """Writes the report of that folder, and what was printed into out.txt beside it."""
    folder = tmp_path_factory.mktemp("report")
    with (folder / "out.txt").open("w") as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        main([str(sweep), f"out={folder}/page.html"])
    return folder


@pytest.fixture
def copied(sweep, tmp_path):
    """Copies a run of the sweep, with other texts in its config.yaml and other values in its
    summary.json."""

    def copy(name: str, target: str, *texts: tuple[str, str], **values) -> Path:
        run = tmp_path / "runs" / target
        shutil.copytree(sweep / name, run)
        config = (run / "config.yaml").read_text()
        for old, new in texts:
            assert old in config
            config = config.replace(old, new)
        (run / "config.yaml").write_text(config)
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(
            json.dumps(summary | {key.replace("_", "/"): value for key, value in values.items()})
        )
        return run

    return copy


@pytest.fixture
def made(sweep, tmp_path):
    """Makes finished runs of 40 steps that end with the given losses, from those of the sweep:
    their curves fall by `slope` a step."""

    def make(
        method: str,
        losses: dict[int, float],
        slope: float = 0.01,
        summary=(),
        figures=(),
        beside: str = "runs",
        **changes,
    ) -> list[Path]:
        found = []
        for seed, loss in losses.items():
            run = tmp_path / beside / f"{method}-{len(list(tmp_path.rglob('config.yaml')))}"
            shutil.copytree(sweep / f"{method}-0", run)
            config = yaml.safe_load((run / "config.yaml").read_text())
            config["seed"] = seed
            for name, value in changes.items():
                inner, _, last = name.rpartition("__")
                (config[inner] if inner else config["optim"])[last] = value
            (run / "config.yaml").write_text(yaml.safe_dump(config))
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            rows = [
                row
                | dict(figures)
                | ({"val/loss": loss + slope * (40 - row["step"])} if "val/loss" in row else {})
                for row in rows
            ]
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            told = (
                json.loads((run / "summary.json").read_text())
                | {"seconds": 1e-9 * rows[-1]["flops"], "val/loss": loss}
                | dict(summary)
            )
            (run / "summary.json").write_text(json.dumps(told))
            found.append(run)
        return found

    return make


def sections_of(folder: Path, *seeds: int) -> list[Section]:
    """Returns the comparisons of a folder; seeds choose the settings, where some are given."""
    return compare([read_run(run) for run in find_runs([folder])], Selection(seeds))


def section_of(folder: Path, *seeds: int) -> Section:
    """Returns the one comparison of a folder."""
    (section,) = sections_of(folder, *seeds)
    return section


def evaluations(run: Path, figure: str) -> tuple[list, list]:
    """Returns the evaluations of a run over a figure, read the slow way."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get("val/loss") is not None]
    return [row[figure] for row in rows], [row["val/loss"] for row in rows]


def between(x: list, y: list, at: float) -> float:
    """Returns the value at `at` of the straight line between the two points around it."""
    after = next(index for index, value in enumerate(x) if value >= at)
    share = (at - x[after - 1]) / (x[after] - x[after - 1])
    return y[after - 1] + share * (y[after] - y[after - 1])


# Numbers


def test_means_and_tests_of_real_runs_against_independent_ones(sweep, report):
    """Mean, standard error, interpolation, and the paired test, whose p has a closed form for three
    pairs: 1 - |t| / sqrt(2 + t^2)."""
    rows = {
        (row["method"], row["at_equal"]): row
        for row in csv.DictReader((report / "page.csv").open())
    }
    assert {method for method, _ in rows} == {"adamw", "sam", "sam compute_matched=true"}
    summaries = {
        name: json.loads((sweep / name / "summary.json").read_text())
        for name in RUNS
        if (sweep / name / "summary.json").exists()
    }
    final = {name: summary["val/loss"] for name, summary in summaries.items()}
    # so it is not the best
    assert final["adamw-slow-0"] > np.mean([final[f"adamw-{seed}"] for seed in SEEDS])
    assert final["sam-wide-0"] > np.mean([final[f"sam-{seed}"] for seed in SEEDS])
    compared = (
        [f"adamw-{seed}" for seed in SEEDS]
        + [f"sam-{seed}" for seed in SEEDS]
        + ["matched-0", "matched-1"]
    )
    for at, figure in (("steps", "step"), ("flops", "flops"), ("seconds", "seconds")):
        budget = 40 if at == "steps" else min(summaries[name][figure] for name in compared)
        assert float(rows["sam", at]["budget"]) == budget
        read = {}
        for name in compared:
            end = summaries[name][figure]
            at_end = end == budget if at == "steps" else end <= 1.05 * budget
            if at_end or end > budget:
                read[name] = (
                    final[name] if at_end else between(*evaluations(sweep / name, figure), budget)
                )
        for method, name, seeds in (
            ("adamw", "adamw", SEEDS),
            ("sam", "sam", SEEDS),
            ("sam compute_matched=true", "matched", (0, 1)),
        ):
            row, values = (
                rows[method, at],
                [read[f"{name}-{seed}"] for seed in seeds if f"{name}-{seed}" in read],
            )
            assert int(row["seeds"]) == len(values)
            if values:
                mean = sum(values) / len(values)
                variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
                assert float(row["mean"]) == pytest.approx(mean, rel=1e-9)
                assert float(row["standard_error"]) == pytest.approx(
                    math.sqrt(variance / len(values)), rel=1e-6
                )
        differences = [read[f"sam-{seed}"] - read[f"adamw-{seed}"] for seed in SEEDS]
        error = np.std(differences, ddof=1) / math.sqrt(3)
        t, middle = np.mean(differences) / error, np.mean(differences)
        expected = {
            "pairs": 3,
            "mean_difference": middle,
            "difference_low_95": middle - 4.3026527 * error,
            "difference_high_95": middle + 4.3026527 * error,
        }
        if at != "seconds":  # the only method with three pairs: Holm leaves its p as it is
            expected |= {
                "t": t,
                "p": 1 - abs(t) / math.sqrt(2 + t * t),
                "p_holm": 1 - abs(t) / math.sqrt(2 + t * t),
            }
        assert {key: float(rows["sam", at][key]) for key in expected} == pytest.approx(
            expected, rel=1e-6
        )
        untested = [
            rows["adamw", at],
            rows["sam compute_matched=true", at],
            *([rows["sam", at]] if at == "seconds" else []),
        ]
        assert all(row[key] == "" for row in untested for key in ("t", "p", "p_holm"))


def test_a_compute_matched_run_counts_at_its_own_end(sweep, report):
    """It ends about where AdamW does in FLOPs, far before it in steps; whole SAM runs are read
    midway, and the page says so."""
    rows = {
        (row["method"], row["at_equal"]): row
        for row in csv.DictReader((report / "page.csv").open())
    }
    matched = rows["sam compute_matched=true", "flops"]
    finals = [
        json.loads((sweep / f"matched-{seed}" / "summary.json").read_text())["val/loss"]
        for seed in (0, 1)
    ]
    assert float(matched["mean"]) == pytest.approx(np.mean(finals), rel=1e-12)
    assert [
        rows[method, "flops"]["midway"] for method in ("adamw", "sam", "sam compute_matched=true")
    ] == ["False", "True", "False"]
    assert rows["sam compute_matched=true", "steps"]["seeds"] == "0"
    assert "the rate is not annealed there yet" in (report / "page.html").read_text()


def test_intervals_and_tests_against_values_by_hand():
    """t(0.975) is 4.3027 for two degrees of freedom and 12.706 for one; p of two degrees is 1 - |t|
    / sqrt(2 + t^2)."""
    found = estimates.estimate([1.0, 2.0, 3.0])
    assert found == (
        2.0,
        pytest.approx(1 / math.sqrt(3)),
        3,
        False,
    ) and found.margin == pytest.approx(4.3026527 / math.sqrt(3))
    assert estimates.estimate([1.0, 3.0]).margin == pytest.approx(12.7062047)
    assert math.isnan(estimates.estimate([1.0, math.nan]).margin)
    test = estimates.paired_test({0: 1.0, 1: 2.0, 2: 3.0, 7: 9.0}, {0: 1.5, 1: 2.3, 2: 3.1, 8: 9.0})
    assert test.by_seed == pytest.approx({0: -0.5, 1: -0.3, 2: -0.1})
    assert test.t == pytest.approx(-0.3 / (0.2 / math.sqrt(3))) and test.p == pytest.approx(
        1 - abs(test.t) / math.sqrt(2 + test.t**2)
    )


@pytest.mark.filterwarnings("error")
def test_fewer_than_three_pairs_and_equal_differences_give_no_test():
    for seeds in range(3):
        few = estimates.paired_test(
            {seed: 3.0 + seed for seed in range(seeds)}, dict.fromkeys(range(5), 3.1)
        )
        assert math.isnan(few.p) and math.isnan(few.t) and len(few.by_seed) == seeds
    same = estimates.paired_test({0: 3.0, 1: 3.5, 2: 4.0}, {0: 3.1, 1: 3.6, 2: 4.1})
    assert same.difference.mean == pytest.approx(-0.1) and math.isnan(same.t) and math.isnan(same.p)


def test_holm_by_hand():
    """0.01 x 3, 0.03 x 2, 0.04 x 1, none below the one before; what has no p is not counted."""
    assert estimates.holm({"a": 0.04, "b": 0.01, "c": math.nan, "d": 0.03}) == pytest.approx(
        {"a": 0.06, "b": 0.03, "d": 0.06}
    )
    assert estimates.holm({"a": 0.9, "b": 0.6}) == {"a": 1.0, "b": 1.0}


def test_a_setting_of_which_a_seed_diverged_is_not_the_best(copied, tmp_path):
    copied("adamw-0", "calm", val_loss=3.0)
    copied("adamw-0", "wild-0", ("lr: 0.01", "lr: 0.02"), val_loss=2.0)
    copied("adamw-0", "wild-1", ("lr: 0.01", "lr: 0.02"), ("\nseed: 0", "\nseed: 1"), val_loss=None)
    section = section_of(tmp_path)
    assert section.best["adamw"].lr == 0.01 and section.best["adamw"].final.mean == 3.0
    assert [setting.diverged for setting in section.methods["adamw"]] == [False, True]


def test_only_like_is_compared_with_like(copied, tmp_path):
    """Another batch is another comparison; another weight decay a variant; another validation set
    or machine a warning; a repeated run is named."""
    copied("adamw-0", "one")
    copied("sam-0", "sam", ("tokens: 512", "tokens: 256"))
    copied("sam-1", "decayed", ("weight_decay: 0.1", "weight_decay: 0.2"))
    copied("adamw-0", "repeated")
    environment = tmp_path / "runs/sam/code/environment.json"
    environment.write_text(
        json.dumps([json.loads(environment.read_text())[-1] | {"devices": ["NVIDIA H200"]}])
    )
    reseal(
        tmp_path / "runs/sam/checkpoints/step_00000040",
        lambda state: state.update(data="0123456789abcdef"),
    )
    section = section_of(tmp_path)
    assert list(section.methods) == ["adamw", "sam", "sam weight_decay=0.2"]
    notes = "\n".join(section.notes)
    for text in (
        "evaluation.tokens differs",
        "the data themselves differ",
        "the machines differ",
        "NVIDIA H200",
        "runs/repeated repeats",
    ):
        assert text in notes
    copied("adamw-0", "large", ("sequences: 4", "sequences: 8"))
    sections = compare([read_run(run) for run in find_runs([tmp_path])])
    assert [(len(section.runs), section.title.partition("steps, ")[2]) for section in sections] == [
        (4, "batch.sequences=4"),
        (1, "batch.sequences=8"),
    ]


# What a reviewer would ask


def told(section: Section) -> str:
    """Returns all that is said of a comparison at its head."""
    return "\n".join(wording.headline(section))


def test_the_headline_says_what_the_table_says(made, tmp_path):
    """Every comparison with AdamW, its marks and its caveats stand in both, and each p is there
    with Holm's."""
    made("adamw", {0: 3.0, 1: 3.1, 2: 3.3}, slope=0.001)
    made("sam", {0: 2.9, 1: 3.05, 2: 3.1}, slope=0.002)
    section = section_of(tmp_path)
    markdown = exports.markdown([section], section.runs)
    for axis, mark in (("steps", ""), ("flops", wording.MIDWAY)):
        text = wording.difference_text(section.tests[axis]["sam"], axis)
        assert f"{mark} (3\u00a0pairs, t\u00a0" in text and "by\u00a0Holm" in text
        assert (
            text in told(section)
            and tables.difference_table(section).rows[0][1 + AXES.index(axis)] == text
        )
        assert wording.loss_text(section.at_equal(axis, "sam")) in told(section)
    assert (
        f"{wording.MIDWAY} over 3 seeds" in told(section)
        and wording.MIDWAY in tables.loss_table(section).rows[1][2]
    )
    made("sam", {0: 3.1, 1: 3.1, 2: 3.45}, slope=0.002, name="gsam")
    both = section_of(tmp_path)
    test = both.tests["steps"]["sam"]
    assert test.holm == pytest.approx(
        2 * test.p
    ) and f"p\u00a0{test.p:.2g}, by\u00a0Holm\u00a0{2 * test.p:.2g}" in told(both)
    assert wording.UNANNEALED in told(section) and "read in the middle" in markdown
    assert "t" not in wording.difference_text(section.tests["seconds"]["sam"], "seconds").replace(
        "\u2020", ""
    )


def test_two_seeds_are_shown_and_not_tested(made, tmp_path):
    made("adamw", {0: 3.0, 1: 3.1})
    made("sam", {0: 2.9, 1: 3.05})
    assert "-0.1000 (seed 0), -0.0500 (seed 1); too few pairs for a test" in told(
        section_of(tmp_path)
    )
    assert "p\u00a0" not in told(section_of(tmp_path))


def test_a_baseline_chosen_among_variants_is_said_to_be(made, tmp_path):
    for decay, loss in ((0.1, 3.4), (0.3, 3.3)):
        made("adamw", {0: loss, 1: loss, 2: loss}, weight_decay=decay)
    made("sam", {0: 3.0, 1: 3.1, 2: 3.0})
    assert (
        "weight_decay=0.3 (lr 0.01; its only setting, one of 2 variants of adamw, the best on the"
        " reported seeds)" in told(section_of(tmp_path))
    )


def test_of_how_many_settings_the_best_was_chosen_and_on_what(made, tmp_path):
    """By default on the seeds that are reported, and the headline says so of both methods."""
    for lr, gain in ((0.01, 0.0), (0.02, 0.1), (0.03, -0.3)):
        made("sam", {0: 3.0 - gain, 1: 3.0 - gain, 2: 3.0 + gain}, lr=lr)
    made("adamw", {0: 3.4, 1: 3.4, 2: 3.4})
    both = section_of(tmp_path)
    assert both.best["sam"].lr == 0.02 or both.best["sam"].lr == 0.03
    assert "best of 3 settings, chosen on these seeds" in told(both) and "its only setting" in told(
        both
    )
    apart = section_of(tmp_path, 0, 1)
    assert apart.best["sam"].lr == 0.02 and apart.at_equal("steps", "sam") == (
        pytest.approx(3.1),
        pytest.approx(math.nan, nan_ok=True),
        1,
        False,
    )
    assert "best of 3 settings, chosen on seeds 0, 1" in told(apart)
    made("sam", {2: 3.3}, weight_decay=0.2)  # a variant that was not tuned: nothing to choose
    assert section_of(tmp_path, 0, 1).at_equal("steps", "sam weight_decay=0.2").mean == 3.3
    assert set(apart.tests["steps"]["sam"].by_seed) == {2}


def test_roles_choose_and_report(made, tmp_path):
    """Runs tagged role=tune choose, those tagged role=report are reported; a method without roles
    does both with all."""
    tune, report = {"tracking__tags": ["mine", "role=tune"]}, {"tracking__tags": ["role=report"]}
    made("sam", {0: 2.0}, lr=0.02, **tune)
    made("sam", {0: 2.5}, lr=0.01, **tune)
    made("sam", {1: 3.0, 2: 3.2}, lr=0.02, **report)
    made("sam", {1: 1.0, 2: 1.2}, lr=0.01, **report)
    made("sam", {5: 0.1}, lr=0.01)
    made("adamw", {1: 3.3, 2: 3.4})
    section = section_of(tmp_path)
    assert section.best["sam"].lr == 0.02 and section.at_equal(
        "steps", "sam"
    ).mean == pytest.approx(3.1)
    assert "chosen on seed 0 (role=tune)" in told(section)
    assert "Runs of sam with neither role=tune nor role=report" in told(section)
    assert section.at_equal("steps", "adamw").seeds == 2
    for run in (tmp_path / "runs").glob("sam-*"):
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace("- role=tune", "- other"))
    section = section_of(tmp_path)  # who has no role chooses beside those that report
    assert section.best["sam"].lr == 0.01 and "chosen on seeds 0, 5;" in told(section)
    made("sam", {0: 2.4}, lr=0.05, tracking__tags=["role=tuen"])
    made("sam", {0: 2.4}, lr=0.06, tracking__tags=["Role = tune"])
    assert "No such role: Role = tune, role=tuen" in told(section_of(tmp_path))


@pytest.mark.parametrize("role", ["role=tune", "role=report"])
def test_runs_of_one_role_alone_do_both(made, tmp_path, role):
    made("sam", {0: 2.5, 1: 2.6}, lr=0.01, tracking__tags=[role])
    made("sam", {0: 2.0, 1: 2.1}, lr=0.02, tracking__tags=[role])
    section = section_of(tmp_path)
    assert section.best["sam"].lr == 0.02 and section.at_equal("steps", "sam").seeds == 2
    assert "best of 2 settings, chosen on these seeds" in told(section)


def test_seeds_both_to_choose_and_to_report_are_named(made, tmp_path):
    made("sam", {0: 2.0, 1: 2.1}, tracking__tags=["role=tune"])
    made("sam", {1: 2.1, 2: 2.3}, tracking__tags=["role=report"])
    assert "sam: seed 1 chose the setting and are in its figure as well" in told(
        section_of(tmp_path)
    )


def test_a_setting_without_a_run_to_report_is_left_out_with_a_word(made, tmp_path):
    made("adamw", {0: 3.0, 1: 3.0, 2: 3.0})
    made("sam", {0: 2.0}, lr=0.02)
    made("sam", {0: 2.5, 1: 2.6}, lr=0.01)
    section = section_of(tmp_path, 0)
    assert list(section.best) == [
        "adamw"
    ] and "sam (lr 0.02, rho 0.05) was chosen on seed 0 and has no finished run to report" in told(
        section
    )


def test_a_method_without_a_run_to_choose_by_is_left_out_with_a_word(made, tmp_path):
    made("adamw", {0: 3.0, 1: 3.0, 2: 3.0})
    for run in made("sam", {0: 2.0}):
        (run / "summary.json").unlink()
    made("sam", {1: 2.5, 2: 2.6})
    section = section_of(tmp_path, 0)
    assert list(section.best) == [
        "adamw"
    ] and "sam has no finished run to choose by (on seed 0); sam is left out" in told(section)


def test_a_setting_from_another_machine_does_not_win_at_equal_time(made, tmp_path):
    made("adamw", {0: 3.0, 1: 3.1})
    made("sam", {0: 2.9, 1: 3.0}, lr=0.01, slope=0.05)
    for run in made("sam", {0: 2.95, 1: 3.05}, lr=0.02, slope=0.001):
        starts = json.loads((run / "code" / "environment.json").read_text())
        (run / "code" / "environment.json").write_text(
            json.dumps([start | {"devices": ["another"]} for start in starts])
        )
    for path in (tmp_path / "runs").glob("*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(
            "".join(json.dumps(row | {"seconds": 1e-9 * row["flops"]}) + "\n" for row in rows)
        )
    section = section_of(tmp_path)
    assert section.chosen["flops"]["sam"].lr == 0.02 and section.chosen["seconds"]["sam"].lr == 0.01
    assert "no evidence, for the machines differ" in wording.winner_at(section, "seconds")


def test_a_difference_to_a_baseline_in_mid_schedule_is_marked_in_the_csv(made, tmp_path):
    made("sam", {0: 2.9, 1: 3.0})
    flops = json.loads((made("adamw", {0: 3.0, 1: 3.1})[0] / "summary.json").read_text())["flops"]
    made(
        "sam", {0: 2.9, 1: 3.0}, rho=0.06, summary={"flops": flops // 2, "seconds": 0.5e-9 * flops}
    )
    rows = csv.DictReader(exports.methods_csv([section_of(tmp_path)]).splitlines())
    (row,) = [row for row in rows if (row["method"], row["at_equal"]) == ("sam", "flops")]
    assert row["difference_midway"] == "True"


def test_at_equal_flops_the_setting_is_chosen_there(made, tmp_path):
    """One that falls late loses at half of its way; table, headline and CSV name the setting of
    each budget."""
    made("adamw", {0: 3.0, 1: 3.1, 2: 3.2})
    made("sam", {0: 2.9, 1: 3.0, 2: 3.1}, lr=0.01, slope=0.05)
    made("sam", {0: 2.95, 1: 3.05, 2: 3.15}, lr=0.02, slope=0.001)
    section = section_of(tmp_path)
    assert [section.chosen[axis]["sam"].lr for axis in ("steps", "flops")] == [0.01, 0.02]
    assert "(lr 0.02, rho 0.05)" in tables.loss_cell(
        section, "flops", "sam"
    ) and "(" not in tables.loss_cell(section, "steps", "sam")
    at = {
        row["at_equal"]: row["lr"]
        for row in csv.DictReader(exports.methods_csv([section]).splitlines())
        if row["method"] == "sam"
    }
    assert at["steps"] == "0.01" and at["flops"] == "0.02"
    short, _ = made("sam", {0: 1.0, 1: 1.1}, lr=0.03, slope=0.0)
    (short / "metrics.jsonl").unlink()  # so nobody knows where it was at the budget
    assert section_of(tmp_path).chosen["flops"]["sam"].lr == 0.02


def test_who_lacks_seeds_does_not_win_without_a_word(made, tmp_path):
    """Whether they crashed, or the setting has fewer than others; runs that never began are counted
    too."""
    made("adamw", {0: 3.0, 1: 3.1, 2: 3.2})
    runs = made("sam", {0: 2.0, 1: 2.1, 2: 2.1})
    (runs[2] / "summary.json").unlink()
    write_jobs(
        tmp_path / "runs",
        [Job(tmp_path / "runs/waiting", [], str(tmp_path), 40, 1, LauncherConfig())],
    )
    section = section_of(tmp_path)
    assert (
        "sam (lr 0.01, rho 0.05) has the lowest validation loss, 2.0500 \u00b1 0.6353 over 2 of 3"
        " seeds" in told(section)
    )
    assert "has 2 finished seeds, where 3 were planned of a setting (seed 2 stopped)" in told(
        section
    )
    assert "not begun or cannot be read: 1;" in told(section)
    assert "1 of 6 runs did not finish" in told(section)
    rows = tables.loss_table(section).rows
    assert [row[7] for row in rows] == ["3", "2 of 3"]


def test_a_shared_machine_is_no_evidence(made, tmp_path):
    """Where seconds per FLOP of one method differ by more than a tenth, nobody wins at equal time;
    by less, somebody does."""
    flops = json.loads((made("adamw", {0: 3.0})[0] / "summary.json").read_text())["flops"]
    made("adamw", {1: 3.1}, summary={"seconds": 1.08e-9 * flops})
    made("sam", {0: 2.9, 1: 3.0})
    assert (
        "has the lowest" in wording.winner_at(section_of(tmp_path), "seconds")
        and not section_of(tmp_path).doubt
    )
    made("adamw", {2: 3.1}, summary={"seconds": 1.2e-9 * flops})
    section = section_of(tmp_path)
    assert "no evidence, for the machine was shared" in wording.winner_at(section, "seconds")
    assert "seconds per FLOP of adamw differ by 20%" in told(section)
    assert "no evidence" in tables.loss_table(section).header[3] and not any(
        "*" in row[3] for row in tables.loss_table(section).rows
    )
    assert "p\u00a0" not in wording.difference_text(section.tests["seconds"]["sam"], "seconds")


def test_children_of_unlike_parents_are_apart(made, tmp_path):
    """Of parents that differ in their seeds only, each its child's, they are repetitions; of
    another method, or with seeds of their own, not."""
    calm, wild = (
        made("adamw", {0: 3.0, 1: 3.1}, beside="parents"),
        made("sam", {0: 3.0, 1: 3.1}, beside="parents"),
    )
    for seed in (0, 1):
        for parent in (calm[seed], wild[seed]):
            made(
                "sam",
                {seed: 2.9 - 0.1 * seed},
                init__run=str(parent),
                init__step=20,
                init__optimizer=True,
            )
    children = section_of(tmp_path / "runs")
    parents = [re.search(r"parent\.optim\.name=(\w+)", method)[1] for method in children.methods]
    assert sorted(parents) == ["adamw", "sam"]
    assert [children.best[method].final.seeds for method in children.methods] == [2, 2]


def test_children_of_one_parent_do_not_mix_with_those_of_their_own(made, tmp_path):
    """From weights alone: a seed of the parent's that is not the child's belongs to what was done.
    A parent that is gone is one of its own."""
    parents = made("adamw", {0: 3.0, 1: 3.1}, beside="parents")
    made("sam", {0: 2.8}, init__run=str(parents[0]))
    made("sam", {1: 2.8}, init__run=str(parents[1]))
    assert len(section_of(tmp_path / "runs").best["sam"].runs) == 2
    made("sam", {1: 2.7}, init__run=str(parents[0]))
    mixed = sections_of(tmp_path / "runs")
    assert sorted(len(section.runs) for section in mixed) == [1, 2] and all(
        "parent.seed=" in section.title for section in mixed
    )
    shutil.rmtree(tmp_path / "parents")
    gone = sections_of(tmp_path / "runs")
    assert len(gone) == 2 and all(
        "are gone" in told(section) and "init.run=" in section.title for section in gone
    )


def test_relative_parents_are_found_where_the_run_was_started_or_beside_it(made, tmp_path):
    (parent,) = made("adamw", {0: 3.0})
    (child,) = made(
        "sam", {0: 2.8}, init__run=f"somewhere/{parent.name}", init__step=20, init__optimizer=True
    )
    assert read_run(child).parent["parent.optim.name"] == "adamw"
    (tmp_path / "elsewhere").mkdir()
    shutil.move(child, tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / child.name
    assert set(read_run(moved).parent) == {"parent.run"}
    starts = json.loads((moved / "code/environment.json").read_text())
    (moved / "code/environment.json").write_text(
        json.dumps([*starts, starts[-1] | {"folder": str(tmp_path)}])
    )
    shutil.copytree(parent, tmp_path / "somewhere" / parent.name)
    assert read_run(moved).parent["parent.optim.name"] == "adamw"


def test_a_seed_counts_once_in_a_setting(made, tmp_path):
    """Two runs of one seed from two copies of its parent: the second is named and left out."""
    parents = made("adamw", {0: 3.0}, beside="parents") + made("adamw", {0: 3.0}, beside="parents")
    for parent, loss in zip(parents, (2.8, 2.6), strict=True):
        made("sam", {0: loss}, init__run=str(parent), init__step=20, init__optimizer=True)
    section = section_of(tmp_path / "runs")
    assert section.best[
        "sam"
    ].final.seeds == 1 and "and is left out (2.6000 beside 2.8000)" in told(section)


def test_imprecise_perturbations_are_marked(made, tmp_path):
    """Where fidelity was measured below 0.9, or the move along the intended one is off by more than
    a tenth; a figure that is not there says nothing."""
    made("adamw", {0: 3.0})
    made("sam", {0: 2.9}, figures={"sharpness/fidelity": 0.95, "sharpness/realised_along": 0.91})
    assert not section_of(tmp_path).imprecise
    made("sam", {1: 2.9}, figures={"sharpness/fidelity": 0.42, "sharpness/realised_along": 1.3})
    section = section_of(tmp_path)
    assert "a cosine of 0.42 with itself in IEEE fp32" in told(section)
    assert f"(lr 0.01, rho 0.05){wording.PRECISION} has the lowest" in told(section)
    assert [row[0] for row in tables.loss_table(section).rows] == [
        "adamw",
        f"sam{wording.PRECISION}",
    ]
    assert tables.difference_table(section).rows[0][0] == f"sam{wording.PRECISION}"


def test_where_data_lie_is_no_part_of_a_comparison(made, tmp_path):
    """The same by checksum are compared; where no checksum is known, the path stands for them."""
    made("adamw", {0: 3.0})
    (moved,) = made("sam", {0: 2.9}, data__path="/elsewhere/corpus.txt")
    section = section_of(tmp_path)
    assert set(section.best) == {"adamw", "sam"} and "differ" not in told(section)
    shutil.rmtree(moved / "checkpoints")
    assert sorted(
        section.title.split("data.path=")[1].endswith("elsewhere/corpus.txt")
        for section in sections_of(tmp_path)
    ) == [False, True]


def test_a_perturbed_adamw_is_no_baseline(made, tmp_path):
    made("sam", {0: 2.9}, name="adamw")
    made("adamw", {0: 3.0})
    section = section_of(tmp_path)
    assert section.baseline == "adamw" and [method.split()[0] for method in section.methods] == [
        "adamw",
        "perturbed",
    ]


def test_a_late_run_is_compared_with_whole_ones(copied, tmp_path):
    """Where it branched off is a variant. Keys that a run does not read are in no name."""
    copied("adamw-0", "whole")
    for step in (10, 20):
        start = (f"  run: {tmp_path}/runs/whole\n  step: {step}\n", "  optimizer: true")
        copied(
            "sam-0",
            f"late-{step}",
            ("init:\n  run: null\n  step: null\n", f"init:\n{start[0]}"),
            ("  optimizer: false", start[1]),
        )
    copied("sam-0", "sgd", ("  base: adamw", "  base: sgd"))
    copied(
        "sam-0",
        "weights",
        (
            "init:\n  run: null\n  step: null\n",
            f"init:\n  run: {tmp_path}/runs/whole\n  step: 10\n",
        ),
    )
    whole, apart = compare([read_run(run) for run in find_runs([tmp_path])])
    assert set(whole.methods) == {
        "adamw",
        "sam base=sgd",
        "sam init.step=10 init.optimizer=true",
        "sam init.step=20 init.optimizer=true",
    }
    assert list(apart.methods) == ["sam"]


# Reading


def test_long_files_are_sampled(copied, tmp_path):
    """Every evaluation is read, of the other rows a sample; what a crash cut short is left out."""
    run = copied("sam-0", "long")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    plain = next(row for row in rows if row["step"] == 20)
    lines = [
        (
            {**plain, "step": step, "val/loss": 9 - step / 1000}
            if step % 70 == 0
            else {"step": step, "train/loss": 4.0}
        )
        for step in range(5001)
    ]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5001, "tr'
    )
    record = read_run(run)
    steps, losses = record.curve("step", "val/loss")
    assert steps.tolist() == list(range(0, 5001, 70)) and losses.tolist() == [
        9 - step / 1000 for step in range(0, 5001, 70)
    ]
    assert (
        0.5 * SAMPLED < len(record.columns["step"]) <= SAMPLED + 72 + 1
        and record.columns["step"][-1] == 5000
    )
    lines = (run / "metrics.jsonl").read_text().split("\n")
    assert 2 not in record.columns["step"]
    (run / "metrics.jsonl").write_text("\n".join([*lines[:2], lines[2][:-4], *lines[3:]]))
    # though it is not read
    assert read_run(run).state == "damaged" and "line 3," in read_run(run).reason


DAMAGES = [
    ("metrics.jsonl", '{"step": 20,', '{"step": 20, \0', "metrics.jsonl, line 6, is damaged"),
    ("metrics.jsonl", '{"step": 20,', '{"st', "metrics.jsonl, line 6, is damaged"),
    (
        "metrics.jsonl",
        '{"step": 20,',
        '{"step": 12,',
        "metrics.jsonl, line 6, is damaged (step 12 comes after step 16)",
    ),
    (
        "metrics.jsonl",
        '"tokens": 2560,',
        '"tokens": "many",',
        "metrics.jsonl, line 6, is damaged (tokens is no number)",
    ),
    ("summary.json", "{", "", "summary.json is damaged"),
    (
        "summary.json",
        '"flops"',
        '"flop"',
        "summary.json is damaged (Object missing required field flops)",
    ),
    (
        "summary.json",
        '"seconds": ',
        '"seconds": -',
        "summary.json is damaged (seconds: Expected float >= 0.0)",
    ),
    ("summary.json", '"val/loss": ', '"val/loss": NaN, "was": ', "summary.json is damaged (val"),
    ("summary.json", '"val/loss": ', '"val/loss": 1e308, "was": ', "summary.json is damaged (val"),
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
        (line,) = [
            line
            for line in printed
            if line.startswith(f"{tmp_path}/runs/bad-{number}: damaged at ")
        ]
        assert f"bad-{number}/{told}" in line
    assert f"1 finished, {len(DAMAGES)} not" in (tmp_path / "report.html").read_text()
    states = [row["state"] for row in csv.DictReader((tmp_path / "report_runs.csv").open())]
    assert states == ["damaged"] * len(DAMAGES) + ["finished"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("axis", ["step", "tokens", "flops", "seconds"])
def test_a_row_may_lack_any_figure(copied, tmp_path, capsys, axis):
    """Of every second row all but its step, or what curves are drawn against, is gone; one has
    figures that no run comes to. What is known is drawn."""
    for number, name in enumerate(("adamw-0", "sam-0", "sam-1")):
        file = copied(name, name) / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows[number % 2 :: 2]:
            for figure in ("tokens", "flops", "seconds") if number else set(row) - {"step"}:
                del row[figure]
        rows[3 - number % 2] |= dict(
            zip(("val/loss", "grad/norm", "train/loss"), (1e308, math.inf, -math.nan), strict=True)
        )
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = read_run(tmp_path / "runs/sam-0")
    known, losses = record.curve(axis, "val/loss")
    assert len(known) == (10 if axis == "step" else 5) and losses.max() < 10
    main([str(tmp_path), f"axis={axis}"])
    assert capsys.readouterr().err == ""


def test_a_summary_beside_the_rows_of_another_run_is_noticed(copied, tmp_path):
    """The figures are reported, with a word: nobody knows which of the two files is right."""
    copied("adamw-0", "whole")
    assert "another run's" not in told(section_of(tmp_path))
    cut = copied("sam-1", "cut") / "metrics.jsonl"
    cut.write_text("".join(cut.read_text().splitlines(keepends=True)[:6]))
    (tmp_path / "runs/whole/summary.json").replace(copied("sam-0", "other") / "summary.json")
    copied("adamw-1", "whole-1")
    said = told(section_of(tmp_path))
    assert "runs/other: its metrics.jsonl ends at a validation loss of" in said
    assert "runs/cut: its metrics.jsonl ends at step 20, its summary.json at 40" in said
    assert said.count("another run's") == 2


def test_a_run_is_known_to_its_sweep_however_it_is_named(sweep, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(sweep / "nowhere")
    reason = read_run(sweep / "nowhere").reason
    assert reason.startswith("error: data.path=nowhere matches no file")
    assert read_run(tmp_path / "link").reason == reason
    monkeypatch.chdir(sweep / "nowhere")
    assert read_run(Path(".")).reason == reason


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv")
def test_folders_that_cannot_be_read_are_named(copied, tmp_path):
    copied("adamw-0", "open")
    copied("sam-0", "closed/sam-0")
    (copied("sam-1", "half") / "metrics.jsonl").chmod(0)
    (tmp_path / "runs/closed").chmod(0)
    # The superuser would read them all the same.
    without = "-dac_override,-dac_read_search"
    started = subprocess.run(
        ["setpriv", "--bounding-set", without, sys.executable, "-m", "launch.report", "runs"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    (tmp_path / "runs/closed").chmod(0o700)
    assert started.returncode == 0
    assert started.stderr == (
        "note: runs/closed cannot be read (Permission denied); what runs it holds are left out\n"
    )
    assert "report of 2 runs" in started.stdout
    assert "runs/half: damaged" in started.stdout and "metrics.jsonl cannot be read" in (
        started.stdout
    )


def test_what_did_not_finish_is_listed_with_its_reason(sweep, report):
    states = {
        Path(row["run"]).name: (row["state"], row["reason"])
        for row in csv.DictReader((report / "page_runs.csv").open())
    }
    assert {name for name, (state, _) in states.items() if state == "finished"} == RUNS.keys() - {
        "diverged",
        "stopped",
    }
    assert states["diverged"][0] == "diverged" and "not finite" in states["diverged"][1]
    assert states["stopped"][0] == "stopped" and "time limit: saved step" in states["stopped"][1]
    assert states["waiting"] == ("waiting", "")
    assert states["nowhere"][0] == "crashed" and states["nowhere"][1].startswith(
        "error: data.path=nowhere matches no file"
    )
    for file in ("page.html", "page.md", "out.txt"):
        text = (report / file).read_text().replace("<wbr>", "")
        assert all(
            f"{sweep}/{name}" in text for name in ("diverged", "stopped", "waiting", "nowhere")
        )
        assert "matches no file" in text


def test_a_run_under_way_and_a_killed_one(sweep, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(sweep / "stopped", run)
    with RunLock(run):
        held = (run / "lock").read_text()
        assert read_run(run).state == "running"
    assert read_run(run).state == "stopped" and "ended before its end" in read_run(run).reason
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    )
    (run / "lock").write_text(json.dumps(json.loads(held) | {"pid": int(ended.stdout)}))
    assert (
        read_run(run).state == "stopped"
        and f"killed: process {int(ended.stdout)} on " in read_run(run).reason
    )


def test_runs_are_found_once_and_only_where_they_are(sweep, tmp_path):
    """Links lead to runs too, a folder with a config.yaml of another kind is none, and what lies
    inside a run is its own business."""
    (tmp_path / "links").mkdir()
    (tmp_path / "links/again").symlink_to(sweep / "sam-0")
    for loop in "ab":
        (tmp_path / "links" / loop).symlink_to(tmp_path)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/config.yaml").write_text("defaults: []\n")
    found = list(find_runs([tmp_path, sweep]))
    assert sorted(run.name for run in found) == sorted(
        ["again", "nowhere", "waiting", *(name for name in RUNS if name != "sam-0")]
    )


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
    """No script, no resource but what stands in the page itself; every reference is to a part of it
    or to a run, and no target has two meanings."""
    page = (report / "page.html").read_text()
    checked = Checked(page)
    assert checked.open == []
    assert not {"script", "link", "img", "iframe", "object", "image"} & {
        tag for tag, _ in checked.elements
    }
    attributes = [(name, value) for _, found in checked.elements for name, value in found.items()]
    ids = [value for name, value in attributes if name == "id"]
    references = [
        value for name, value in attributes if name in ("href", "xlink:href", "src")
    ] + re.findall(r"url\((.*?)\)", page)
    assert len(ids) == len(set(ids))
    targets, runs = (
        {value for value in references if value.startswith("#") is inside}
        for inside in (True, False)
    )
    assert {value[1:] for value in targets} <= set(ids) and {
        "#section0",
        "#section0-losses",
        "#failed",
    } <= targets
    assert (
        runs
        and all((report / unquote(run)).is_dir() for run in runs)
        and any("diverged" in run for run in runs)
    )
    assert "@import" not in page
    assert not re.search(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", page))
    assert ("name", "viewport") in attributes and "prefers-color-scheme: dark" in page
    # closed on the screen, all on paper
    assert (
        "details::details-content { content-visibility: visible; }"
        in page.partition("@media print")[2]
    )


def test_charts_are_real(report):
    """Loss against steps, FLOPs and time, both responses and what rows measured; each with units
    and a legend."""
    page = (report / "page.html").read_text()
    figures = re.findall(r"<figure>(.*?)</figure>", page, re.DOTALL)
    for label in (
        "steps",
        "tokens (10^3)",
        "training FLOPs",
        "training time (seconds",
        "training loss (nats per token)",
        "radius rho",
        "peak learning rate",
        "moved minus clean loss",
        "norm of the gradient",
        "tokens per second",
        "loss minus adamw",
    ):
        assert any(f">{label}" in figure for figure in figures), label
    assert all(">sam<" in figure or ">adamw<" in figure for figure in figures)
    assert all('width="' not in figure.split(">")[0] and "viewBox" in figure for figure in figures)
    loss = Checked(figures[0])
    assert {"adamw", "sam", "sam compute_matched=true"} <= set(
        re.findall(r">([^<>]+)</text>", figures[0])
    ) and loss.open == []


def test_methods_look_different_and_the_same_everywhere():
    names = ["adamw", "adamw weight_decay=0.2", *(f"method_{number:02}" for number in range(16))]
    looks = drawing.styles(name for name in names)
    assert len({(look.color, look.dash) for look in looks.values()}) == len(names)
    assert (
        len({looks[f"method_{number:02}"].color for number in range(10)} | {looks["adamw"].color})
        == 11
    )
    assert drawing.styles(reversed(names)) == looks and looks["adamw"].color == drawing.INK


def test_every_seed_stays_in_the_axes():
    """Of the last four fifths; the fall before is cut off."""
    x, losses = np.arange(11.0), np.array([9.0, 8.0, *np.linspace(3, 2, 9)])
    _figure, axes = drawing.new_axes()
    drawing.frame_late(
        axes,
        [
            drawing.Line("sam", x, np.array([losses, losses - 0.7])),
            drawing.Line("adamw", x, losses[None] + 0.3),
        ],
    )
    low, high = axes.get_ylim()
    assert low < 2 - 0.7 < low + 0.2 and 3 + 0.3 < high < 3.5


def points(figure, label: str) -> list:
    """Returns the y values of the line of this name."""
    axes, *_ = figure.axes
    return next(line for line in axes.lines if line.get_label() == label).get_ydata().tolist()


def test_the_difference_to_adamw_is_drawn_with_each_seed(made, tmp_path):
    """At the steps that both were evaluated at, seed by seed; a method that ends elsewhere is not
    there."""
    made("adamw", {0: 3.0, 1: 3.2})
    made("sam", {0: 2.9, 1: 3.3, 5: 9.0})
    made("sam", {0: 2.9, 1: 3.3}, name="short", summary={"step": 20})
    section = section_of(tmp_path)
    figure = line_charts.difference_chart(section, drawing.styles(section.methods))
    assert points(figure, "sam") == pytest.approx([0.0] * 11)
    assert "short" in section.best and "short" not in {
        line.get_label() for line in figure.axes[0].lines
    }
    drawn = sorted(
        {
            round(float(np.mean(line.get_ydata())), 6)
            for line in figure.axes[0].lines
            if len(line.get_ydata()) == 11
        }
    )
    assert drawn == [-0.1, 0.0, 0.1]


def test_a_map_of_learning_rate_by_radius_where_both_were_swept(made, tmp_path):
    for lr, rho, loss in ((0.01, 0.1, 3.11), (0.02, 0.1, 3.21), (0.01, 0.2, 3.12)):
        made("sam", {0: loss, 1: loss + 0.02}, lr=lr, rho=rho)
    section = section_of(tmp_path)
    texts = {
        text.get_text(): text.get_position()
        for text in response_charts.grid_chart(section).axes[0].texts
    }
    assert texts == {"3.1200": (0, 0), "3.2200": (1, 0), "3.1300": (0, 1)}
    (tmp_path / "less").mkdir()
    made("sam", {0: 3.0}, beside="less", lr=0.01, rho=0.1)
    made("sam", {0: 3.0}, beside="less", lr=0.02, rho=0.1)
    assert response_charts.grid_chart(section_of(tmp_path / "less")) is None


def test_response_charts_show_every_seed(made, tmp_path):
    made("sam", {0: 3.1, 1: 3.3}, rho=0.1)
    made("sam", {0: 3.4, 1: 3.6}, rho=0.2)
    section = section_of(tmp_path)
    axes = response_charts.response_chart(section, drawing.styles(section.methods), "rho").axes[0]
    dots = sorted(
        tuple(place) for cloud in axes.collections for place in cloud.get_offsets().tolist()
    )
    assert dots == [(0.1, 3.1), (0.1, 3.3), (0.2, 3.4), (0.2, 3.6)]
    assert axes.get_xlabel() == "radius rho" and axes.get_ylabel().startswith(
        "final validation loss"
    )


@pytest.mark.parametrize(
    ("suffix", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_one_chart_for_a_paper(sweep, tmp_path, capsys, suffix, begins):
    """In one file and no other, the same bytes each time."""
    for name in ("one", "two"):
        main([str(sweep), f"out={tmp_path}/{name}.{suffix}", "chart=difference"])
    first, second = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("one", "two"))
    assert first.startswith(begins) and first == second and len(list(tmp_path.iterdir())) == 2
    assert "difference of tiny, text, 40 steps" in capsys.readouterr().out


@pytest.mark.parametrize("chart", ["loss", "training", "rho", "lr", "sharpness/gap", "grad/norm"])
def test_which_chart_is_an_option(sweep, tmp_path, chart):
    main([str(sweep), f"out={tmp_path}/chart.svg", f"chart={chart}", "axis=flops"])
    text = (tmp_path / "chart.svg").read_text()
    assert ("training FLOPs" in text) is (chart not in ("rho", "lr"))


@pytest.mark.parametrize(
    ("axis", "label"),
    [
        ("step", "steps"),
        ("tokens", "tokens"),
        ("flops", "training FLOPs"),
        ("seconds", "training time"),
    ],
    ids=str,
)
def test_every_figure_is_drawn_against_what_is_asked_for(sweep, axis, label):
    """With the values of that axis in its rows: the longest run ends at the right edge."""
    section = section_of(sweep)
    looks = drawing.styles(section.methods)
    drawn = [
        line_charts.training_chart(section, looks, axis),
        *line_charts.measured_charts(section, looks, axis)[0].values(),
    ]
    assert len(drawn) > 5 and all(chart.axes[0].get_xlabel().startswith(label) for chart in drawn)
    lines, unit = drawing.in_units(
        [line for line in drawing.lines_of(section, axis, "train/loss") if line.method == "sam"],
        axis,
    )
    last = [run.columns[axis][-1] for run in section.best["sam"].runs]
    scale = float(unit.split("(10^")[1].rstrip(")")) if "10^" in unit else 0
    if axis != "seconds":
        assert lines[0][1][-1] * 10**scale == pytest.approx(sum(last) / len(last), rel=0.2)


def test_constants_are_told_and_not_drawn(sweep):
    """Digits of rounding are no news; of a figure that changes in one method, all are drawn."""
    section = section_of(sweep)
    for run in (
        run for method, setting in section.best.items() if method != "adamw" for run in setting.runs
    ):
        run.columns["sharpness/realised_radius"] = 0.05 + 1e-8 * run.columns["step"]
    drawn, constant = line_charts.measured_charts(section, drawing.styles(section.methods))
    assert "sharpness/realised_radius" not in drawn and "sharpness/gap" in drawn
    assert any(
        text.startswith("Length of what the compute precision left of the move")
        and text.endswith("sam: 0.05, sam compute_matched=true: 0.05")
        for text in constant
    )
    for run in section.best["sam"].runs:
        run.columns["sharpness/realised_radius"] = 0.05 * run.columns["step"]
    assert (
        "sharpness/realised_radius"
        in line_charts.measured_charts(section, drawing.styles(section.methods))[0]
    )


def test_axes_have_titles_in_words():
    """No figure's own name, and nothing longer than its axis."""
    titles = [meanings.title(name) for name in [*meanings.MEANINGS, "sharpness/of_my_own"]]
    assert all(
        "/" not in title and "_" not in title and len(title) <= 32 for title in titles
    ) and len(set(titles)) == len(titles)


def test_the_losses_come_first_in_the_table(report):
    """On a telephone the rest is beyond the edge."""
    header = next(
        line
        for line in (report / "page.md").read_text().splitlines()
        if line.startswith("| method | equal")
    )
    columns = [re.split("[:,] ", text)[0] for text in header.strip("| ").split(" | ")]
    assert columns == [
        "method",
        "equal steps",
        "equal FLOPs",
        "equal time",
        "best lr",
        "best rho",
        "settings",
        "n",
        "n",
        "n",
    ]


def test_names_are_escaped(copied, tmp_path):
    """Whoever names a run or a corpus writes no HTML, no row of a table and no formula."""
    copied(
        "sam-0",
        '<b onclick="x">&|$',
        ("name: sam\n", "name: <i>$x^2$|</i>\n"),
        ("  name: text\n", '  name: "<script>|"\n'),
    )
    main([str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    checked = Checked(page)
    assert checked.open == [] and not {"script", "b", "i"} & {tag for tag, _ in checked.elements}
    assert '<b onclick="x">&|$' in checked.text and "<i>$x^2$|</i>" in checked.text
    assert re.search(r"<text[^>]*>&lt;i&gt;\$x\^2\$\|&lt;/i&gt;</text>", page)
    copied(
        "sam-1",
        "=1+1",
        ("name: sam\n", "name: <i>$x^2$|</i>\n"),
        ("  name: text\n", '  name: "<script>|"\n'),
    )
    main([str(tmp_path)])
    markdown = (tmp_path / "report.md").read_text()
    assert re.search(
        r"^\| &lt;i&gt;\\\$x\^2\\\$\\\|&lt;/i&gt; \|", markdown, re.MULTILINE
    ) and not re.search("<(i|script|b)", markdown)


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", " =1+1", "\n=1", "\uff1d1+1"]
)
def test_no_text_is_a_formula(text):
    """Numbers stay numbers, negative ones too."""
    ((cell, negative, plain),) = csv.reader(
        io.StringIO(exports.csv_text([], [[text, -0.25, "a-b"]])[1:], newline="")
    )
    assert cell == f"'{text}".replace("\r", " ") and negative == "-0.25" and plain == "a-b"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b\nc", "a\\|b c"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("*a* _b_ `c` ~~d~~", r"\*a\* \_b\_ \`c\` \~\~d\~\~"),
        ("[a](b)", r"\[a\](b)"),
        ("# a", r"\# a"),
        ("- a", r"\- a"),
        ("1. a", r"1\. a"),
        ("lr 0.01", "lr 0.01"),
        ("-0.0123 ± 0.1", "-0.0123 ± 0.1"),
        ("3.25", "3.25"),
        ("---", r"\---"),
    ],
)
def test_markdown_shows_texts_as_they_are(text, escaped):
    assert exports.markdown_text(text) == escaped


def test_runs_of_one_name_are_told_apart_by_their_paths(copied, tmp_path):
    copied("adamw-0", "one/run")
    copied("sam-0", "two/run")
    copied("sam-1", "another")
    rows = tables.runs_table(section_of(tmp_path)).rows
    assert {row[0] for row in rows} == {
        f"{tmp_path}/runs/one/run",
        f"{tmp_path}/runs/two/run",
        "another",
    }


@pytest.mark.filterwarnings("error")
def test_a_folder_may_have_any_name(copied, tmp_path, capsys):
    """One that is no UTF-8, one of several lines, and one in letters that the font lacks: the files
    are UTF-8, a run is a line, its link leads to it."""
    odd = [b"\xff\xfe", b"a\nb\x1b[31m", "\u6f22".encode()]
    for number, name in enumerate(odd):
        run = copied(f"sam-{number}", str(number), ("name: sam\n", "name: \u6f22\n"))
        (run / "summary.json").unlink()
        os.rename(run, os.path.join(os.fsencode(run.parent), name))
    copied("sam-0", "calm", ("name: sam\n", "name: \u6f22\n"))
    main([str(tmp_path), f"out={tmp_path}/page.html"])
    printed = capsys.readouterr()
    assert printed.err == ""
    for shown in (r"\udcff\udcfe", r"a\nb\x1b[31m", "\u6f22"):
        assert f"\n{tmp_path}/runs/{shown}: stopped at step" in printed.out
        assert f"{tmp_path}/runs/{shown}," in (tmp_path / "page_runs.csv").read_text()
    links = {
        value
        for _, found in Checked((tmp_path / "page.html").read_text()).elements
        for value in found.values()
    }
    assert {"runs/%FF%FE/", "runs/a%0Ab%1B%5B31m/", "runs/%E6%BC%A2/"} <= links


def test_a_page_is_written_where_its_link_leads(copied, tmp_path):
    run = copied("sam-0", "run")
    for name in ("site", "pages"):
        (tmp_path / name).mkdir()
    (tmp_path / "site/page.html").write_text("older")
    (tmp_path / "pages/link.html").symlink_to(tmp_path / "site/page.html")
    for _ in "ab":  # the second time over its own files
        main([str(run), f"out={tmp_path}/pages/link.html"])
    assert (tmp_path / "pages/link.html").is_symlink()
    assert "1 run" in (tmp_path / "site/page.html").read_text()
    assert sorted(path.name for path in (tmp_path / "pages").iterdir()) == [
        "link.csv",
        "link.html",
        "link.md",
        "link_runs.csv",
    ]


@pytest.mark.parametrize("name", ["notes.md", "notes.csv", "notes_runs.csv"])
def test_no_file_beside_the_page_is_overwritten_but_a_reports(copied, tmp_path, capsys, name):
    run = copied("sam-0", "run")
    (tmp_path / name).write_text("# Mine\n")
    with pytest.raises(SystemExit):
        main([str(run), f"out={tmp_path}/notes.html"])
    assert (
        f"error: out={tmp_path}/notes.html would overwrite {tmp_path}/{name}, which is no report's;"
        " move that file" in capsys.readouterr().err
    )
    assert (tmp_path / name).read_text() == "# Mine\n"
    assert not (tmp_path / "notes.html").exists()


def test_one_run_is_a_report_too(sweep, tmp_path, capsys):
    main([str(sweep / "adamw-0"), f"out={tmp_path}/one.html"])
    assert "There is no other method to compare" in capsys.readouterr().out
    page = (tmp_path / "one.html").read_text()
    told = Checked(page).text
    assert "<h1>1 run</h1>" in page and "paired" not in told
    assert all(
        text in told
        for text in (
            "final validation loss (nats per token)",
            "bits per byte",
            "optim.lr",
            "parameters",
        )
    )
    assert all(
        f">{title}" in page
        for title in ("learning rate</text>", "training loss", "validation loss", "largest logit")
    )


def test_a_run_that_did_not_finish_shows_its_curves(sweep, tmp_path, capsys):
    main([str(sweep / "diverged"), f"out={tmp_path}/one.html"])
    assert "diverged at step" in capsys.readouterr().out
    assert (
        ">norm of the gradient</text>" in (tmp_path / "one.html").read_text()
        or ">learning rate</text>" in (tmp_path / "one.html").read_text()
    )


def test_a_run_that_lost_its_rows_still_counts_at_its_end(copied, tmp_path, capsys):
    """Its summary tells the final loss; where it would have to be read midway, it is left out."""
    copied("adamw-0", "whole")
    (copied("sam-0", "bare", val_loss=2.5) / "metrics.jsonl").unlink()
    main([str(tmp_path)])
    rows = {
        (row["method"], row["at_equal"]): row
        for row in csv.DictReader((tmp_path / "report.csv").open())
    }
    assert rows["sam", "steps"]["mean"] == "2.5" and rows["sam", "flops"]["seeds"] == "0"


def test_a_folder_without_a_finished_run_is_a_report_too(sweep, tmp_path, capsys):
    main([str(sweep / "stopped"), str(sweep / "diverged"), f"out={tmp_path}/none.html"])
    assert "No run is finished yet" in capsys.readouterr().out
    assert "0 finished, 2 not" in (tmp_path / "none.html").read_text()


def test_a_chart_of_runs_that_are_not_finished_is_of_one_alone(sweep, tmp_path, capsys):
    runs = [str(sweep / name) for name in ("stopped", "diverged")]
    with pytest.raises(SystemExit):
        main([*runs, f"out={tmp_path}/chart.png"])
    assert "none is; name one run alone to see its curves" in capsys.readouterr().err
    main([str(sweep / "diverged"), f"out={tmp_path}/chart.png", "chart=optim/lr"])
    assert [path.name for path in tmp_path.iterdir()] == ["chart.png"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["."], "no run in there"),
        ([".", "output=x"], "output=x: no such option; did you mean out=?"),
        (
            ["RUN", "out=x.doc"],
            "out=x.doc cannot be written; name an .html, .png, .svg or .pdf file",
        ),
        (["RUN", "chart=loss"], "chart=loss is one chart"),
        (
            ["RUN", "out=x.png", "chart=nothing"],
            "chart=nothing: these runs have no such chart; choose one of loss, training, ",
        ),
        (["RUN", "select_seeds=a"], "select_seeds=a is no list of seeds; write select_seeds=0,1"),
        (["RUN", "select_seeds=0"], "select_seeds=0 leaves no seed to report on"),
        (["RUN", "select_seeds=0,9"], "select_seeds=0,9: no run has seed 9; there are seed 0"),
        (
            ["RUN", "out=nowhere/x.html"],
            (
                "out=nowhere/x.html cannot be written; name an .html, .png, .svg or .pdf file in a"
                " folder"
            ),
        ),
    ],
)
def test_mistakes_cost_one_line(sweep, tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([argument.replace("RUN", str(sweep / "adamw-0")) for argument in arguments])
    errors = capsys.readouterr().err
    assert (
        ended.value.code == 2
        and errors.startswith("error: ")
        and told in errors
        and errors.count("\n") == 1
    )
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_it_says_what_to_install(sweep, monkeypatch, capsys):
    for name in ("writing", "drawing"):
        monkeypatch.delitem(sys.modules, f"launch.report.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        main([str(sweep)])
    assert "matplotlib" in (told := capsys.readouterr().err) and "pip install" in told
    assert not (sweep / "report.html").exists()
