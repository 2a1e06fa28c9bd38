#!/usr/bin/env bash
# The grid of Functional-SAM (2502.02407) at a fixed number of steps: methods x radii x sizes x seeds, AdamW once a size and seed.
#   python -m data.prepare data=c4 tokenizer=bpe_32768         first, where there is a network
#   launch/fixed_length.sh print_only=true                     every run and its GPU-hours
#   launch/fixed_length.sh hydra.launcher.gpus_per_node=8 parallel=fsdp hydra.launcher.timeout_min=1440
#   LAUNCHER=local SIZES=nanodo_24m SEEDS=0 launch/fixed_length.sh data.documents=1000000
# The same command again goes on with what is not finished; python -m launch.status and launch.report read runs/fixed_length.
set -euo pipefail
python "$(dirname "$0")/../train.py" -m hydra/launcher="${LAUNCHER:-slurm}" hydra.sweep.dir=runs/fixed_length experiment=functional_sam_c4 \
    model="${SIZES:-nanodo_24m,nanodo_43m,nanodo_118m,nanodo_1208m}" \
    optim="${METHODS:-adamw,sam,functional_sam,preconditioned_sam,preconditioned_functional_sam}" \
    optim.rho="${RADII:-0.01,0.02,0.05,0.1,0.2}" seed="${SEEDS:-0,1,2}" \
    schedule=fixed schedule.steps="${STEPS:-10000}" "$@"
