#!/usr/bin/env bash
# Several machines without a scheduler. Run this on every one of them, with the same folder mounted and the same flags:
#   RUN=xl-1 NODES=4 HEAD=10.0.0.1 bash runs/nodes.sh --preset=gpt2-xl --dataset=NAME --parallel=hsdp
# HEAD is one of them; the others find it there. RUN names this launch, a new name each time: it is how a restarted process
# knows its own run.
# A process that dies is started again with the others (a test, with two such launches on one machine). Not yet tried: that a
# lost machine can come back.
set -euo pipefail
cd "$(dirname "$0")/.."
processes=${NPROC:-$({ nvidia-smi -L 2> /dev/null || true; } | wc -l)}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1     # after a restart processes meet in a new place, without addresses of the dead
exec torchrun --nnodes="${NODES:-1}" --nproc_per_node="$((processes > 0 ? processes : 1))" --max_restarts=3 \
    --rdzv_backend=c10d --rdzv_endpoint="${HEAD:-localhost}:${PORT:-29500}" \
    --rdzv_id="${RUN:?name this launch, the same on all machines: RUN=xl-1}" train.py "$@"
