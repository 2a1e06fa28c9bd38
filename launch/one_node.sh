#!/usr/bin/env bash
# One node, a process a GPU:
#   launch/one_node.sh parallel=fsdp model=gpt2_355m ...
#   PROCESSES=2 launch/one_node.sh parallel=fsdp device=cpu ...        on a machine without GPUs
# Ctrl-C or TERM save and stop; the same command goes on.
set -euo pipefail
exec torchrun --standalone --nproc-per-node "${PROCESSES:-gpu}" "$(dirname "$0")/../train.py" "$@"
