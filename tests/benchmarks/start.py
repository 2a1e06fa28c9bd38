"""How long a run takes from its start to its first step, in units of `import torch`.

    python tests/benchmarks/start.py [--rounds 7]

The quickstart with its data prepared and its first evaluation cut to one window; both commands are
whole processes and take turns. The first step has begun when its batch is asked for, which the
child reports."""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date

import torch

RUN = """
import sys, time
import data.loader
ask = data.loader.Prefetcher.next
def first(self):
    print("first step", time.time(), flush=True)
    return ask(self)
data.loader.Prefetcher.next = first
sys.argv[0] = "train.py"
import train
from launch import config
config.main(train.main)
"""


def seconds_to_first_step(folder: str, round_: int) -> float:
    """From starting the process to asking for the first batch."""
    overrides = [
        f"dir={folder}/{round_}",
        f"data.cache={folder}/cache",
        "evaluation.tokens=256",
        "evaluation.sample=0",
        "evaluation.baselines=false",
        "experiment=quickstart",
        "schedule.steps=1",
        "tracking=none",
    ]
    began = time.time()
    child = subprocess.run(
        [sys.executable, "-c", RUN, *overrides], check=True, capture_output=True, text=True
    )
    return next(
        float(line.split()[-1]) - began
        for line in child.stdout.splitlines()
        if line.startswith("first step")
    )


def seconds_to_import_torch() -> float:
    """From starting the process to its end."""
    began = time.time()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.time() - began


def main() -> None:
    """Prints the medians and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    imports, starts = [], []
    with tempfile.TemporaryDirectory() as folder:
        seconds_to_first_step(folder, -1)  # prepares the data
        for round_ in range(rounds):
            imports.append(seconds_to_import_torch())
            starts.append(seconds_to_first_step(folder, round_))
    ratio = statistics.median(start / torch_ for start, torch_ in zip(starts, imports, strict=True))
    print(
        f"{date.today()}, torch {torch.__version__}: import torch {statistics.median(imports):.2f}"
        f" s, start to first step {statistics.median(starts):.2f} s, ratio {ratio:.2f} (median of"
        f" {rounds} pairs)"
    )


if __name__ == "__main__":
    main()
