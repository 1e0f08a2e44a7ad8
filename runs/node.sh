#!/usr/bin/env bash
# One machine, all its GPUs (or NPROC processes): bash runs/node.sh --preset=gpt2 --dataset=NAME --parallel=fsdp
# A process that dies is started again with the others, from the last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
processes=${NPROC:-$(nvidia-smi -L 2> /dev/null | wc -l)}
exec torchrun --standalone --nproc_per_node="$((processes > 0 ? processes : 1))" --max_restarts=3 train.py "$@"
