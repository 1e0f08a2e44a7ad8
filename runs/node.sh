#!/usr/bin/env bash
# One machine, all its GPUs (or NPROC processes): bash runs/node.sh --preset=gpt2 --dataset=NAME --parallel=fsdp
# A process that dies is started again with the others, from the last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
processes=${NPROC:-$({ nvidia-smi -L 2> /dev/null || true; } | wc -l)}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1     # after a restart processes meet in a new place, without addresses of the dead
exec torchrun --standalone --nproc_per_node="$((processes > 0 ? processes : 1))" --max_restarts=3 train.py "$@"
