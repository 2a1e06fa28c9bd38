#!/usr/bin/env bash
# The same grid on the Chinchilla ladder: every size trains on 20 tokens per parameter.
#   launch/chinchilla.sh print_only=true
#   launch/chinchilla.sh hydra.launcher.gpus_per_node=8 parallel=fsdp hydra.launcher.timeout_min=1440
# The radii that won at the smaller sizes do for the largest: SIZES=nanodo_1208m RADII=0.05 launch/chinchilla.sh ...
set -euo pipefail
python "$(dirname "$0")/../train.py" -m hydra/launcher="${LAUNCHER:-slurm}" hydra.sweep.dir=runs/chinchilla experiment=functional_sam_c4 \
    model="${SIZES:-nanodo_24m,nanodo_43m,nanodo_118m,nanodo_1208m}" \
    optim="${METHODS:-adamw,sam,functional_sam,preconditioned_sam,preconditioned_functional_sam}" \
    optim.rho="${RADII:-0.01,0.02,0.05,0.1,0.2}" seed="${SEEDS:-0,1,2}" \
    schedule=chinchilla schedule.tokens_per_parameter="${TOKENS_PER_PARAMETER:-20}" "$@"
