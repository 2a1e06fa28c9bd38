#!/usr/bin/env bash
# A few dozen steps of every method on this machine, then a table: validation loss, time of a step beside AdamW's, memory on a GPU.
#   launch/smoke.sh [KEY=VALUE ...]
#   STEPS=100 FOLDER=runs/mine launch/smoke.sh precision=fp32
# The same command again only prints the table. Exit code 1 where a method failed.
set -uo pipefail
root="$(dirname "$0")/.."
folder="${FOLDER:-runs/smoke}"
methods="$(basename --suffix=.yaml --multiple "$root"/conf/optim/*.yaml | paste --serial --delimiters=,)"

python "$root/train.py" -m hydra/launcher=local hydra.sweep.dir="$folder" experiment=quickstart optim="${METHODS:-$methods}" \
    schedule.steps="${STEPS:-40}" tracking.mode=off tracking.every=5 compile=none checkpoint.every=1000 \
    evaluation.every=1000 evaluation.tokens=65536 evaluation.baselines=false evaluation.sample=0 "$@"
code=$?

python - "$folder" <<'EOF_TABLE'
import json
import sys
from pathlib import Path
from statistics import median

def figures(run):
    """Final loss, tokens a second, GiB: of the rows after the first, which holds what happens once."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    speeds = [row["perf/tokens_per_second"] for row in rows if "perf/tokens_per_second" in row]
    loss = json.loads((run / "summary.json").read_text())["val/loss"]
    return loss, median(speeds[1:] or speeds), rows[-1].get("perf/memory_gib")

runs = {run.parent.name.split("-")[1]: figures(run.parent) for run in Path(sys.argv[1]).glob("*/summary.json")}
plain = runs.get("adamw", (0, float("nan"), None))[1]
print(f"\n{'method':30}{'val loss':>10}{'step time':>11}{'GPU memory':>12}")
for method, (loss, speed, memory) in sorted(runs.items(), key=lambda entry: entry[1][0]):
    print(f"{method:30}{loss:10.4f}{plain / speed:10.2f}x" + (f"{memory:8.2f} GiB" if memory else f"{'-':>12}"))
EOF_TABLE
exit "$code"
