"""The time of a report of 200 finished runs: python tests/benchmarks/report.py RUN_DIR
[ROWS_OF_EACH]

RUN_DIR is a finished run of a rule with a radius. 8 methods x 5 learning rates x 5 seeds are made
from it, with 3000 rows each (1.2 KB a row). 2 cores of an AMD EPYC machine with other work on it,
2026-11-21: 11.4 s for 671 MB."""

import json
import random
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import yaml

from launch.run.folder import read_rows

METHODS = (
    "adamw",
    "sam",
    "functional_sam",
    "preconditioned_sam",
    "asam",
    "momentum_sam",
    "look_sam",
    "gsam",
)
RATES = (1e-3, 2e-3, 3e-3, 5e-3, 1e-2)


def copy(run: Path, target: Path, method: str, lr: float, seed: int, steps: int) -> None:
    """Writes a run of `steps` rows that looks like the given one."""
    target.mkdir(parents=True)
    config, summary = (
        yaml.safe_load((run / "config.yaml").read_text()),
        json.loads((run / "summary.json").read_text()),
    )
    config["optim"] |= {"name": method, "lr": lr}
    config["seed"], config["schedule"]["steps"] = seed, steps
    (target / "config.yaml").write_text(yaml.safe_dump(config))
    rows = read_rows(run / "metrics.jsonl")
    row = {name: value for name, value in rows[-1].items() if not name.startswith("val/")}
    chance = random.Random(f"{method} {lr} {seed}")
    with (target / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            loss = 3 + 8 * (step + 8) ** -0.5 + abs(lr - 3e-3) + chance.gauss(0, 0.01)
            share = {
                name: step / summary["step"] * summary[name]
                for name in ("tokens", "flops", "seconds")
            }
            evaluated = {"val/loss": loss} if step % (steps // 10) == 0 else {}
            file.write(
                json.dumps(row | {"step": step, **share, "train/loss": loss, **evaluated}) + "\n"
            )
    (target / "summary.json").write_text(
        json.dumps(summary | {"step": steps, **share, "val/loss": loss})
    )


def main(run: Path, steps: int) -> None:
    """Makes the runs, and prints how long their report takes."""
    with tempfile.TemporaryDirectory() as folder:
        for method, lr, seed in product(METHODS, RATES, range(5)):
            copy(run, Path(folder) / f"{method}-{lr}-{seed}", method, lr, seed, steps)
        size = sum(file.stat().st_size for file in Path(folder).rglob("metrics.jsonl"))
        began = time.perf_counter()
        out = subprocess.run(
            [sys.executable, "-m", "launch.report", folder],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        print(out + f"{time.perf_counter() - began:.1f} s for {size / 1e6:,.0f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3000)
