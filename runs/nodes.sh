#!/usr/bin/env bash
# Several machines without a scheduler. Run this on every one of them, with the same folder mounted and the same flags:
#   NODES=4 HEAD=10.0.0.1 bash runs/nodes.sh --preset=gpt2-xl --dataset=NAME --parallel=hsdp
# HEAD is one of them; the others find it there. When one machine is lost, all wait for it to come back.
set -euo pipefail
cd "$(dirname "$0")/.."
processes=${NPROC:-$(nvidia-smi -L 2> /dev/null | wc -l)}
exec torchrun --nnodes="${NODES:-1}" --nproc_per_node="$((processes > 0 ? processes : 1))" --max_restarts=3 \
    --rdzv_backend=c10d --rdzv_endpoint="${HEAD:-localhost}:${PORT:-29500}" --rdzv_id="${RUN:-nanopath}" train.py "$@"
