#!/usr/bin/env bash
# One machine, all its GPUs (or NPROC processes): bash runs/node.sh --preset=gpt2 --dataset=NAME --parallel=fsdp
# When a process dies, all are started again from the last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
processes=${NPROC:-$({ nvidia-smi -L 2> /dev/null || true; } | wc -l)}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1     # a restart gets a new store, without the addresses of dead processes
exec torchrun --standalone --nproc_per_node="$((processes > 0 ? processes : 1))" --max_restarts=3 train.py "$@"
