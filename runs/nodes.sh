#!/usr/bin/env bash
# Several machines without a scheduler. Run this on every machine, with the same folder mounted and the same flags:
#   RUN=xl-1 NODES=4 HEAD=10.0.0.1 bash runs/nodes.sh --preset=gpt2-xl --dataset=NAME --parallel=hsdp
# HEAD is the address of one of them, where all others connect. RUN is the name of this launch, a new one each time: by it a
# restarted process recognises its own run.
# When a process dies, all are started again (tested with two such launches on one machine). Not tested: a machine that is
# lost and returns.
set -euo pipefail
cd "$(dirname "$0")/.."
processes=${NPROC:-$({ nvidia-smi -L 2> /dev/null || true; } | wc -l)}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1     # a restart gets a new store, without the addresses of dead processes
exec torchrun --nnodes="${NODES:-1}" --nproc_per_node="$((processes > 0 ? processes : 1))" --max_restarts=3 \
    --rdzv_backend=c10d --rdzv_endpoint="${HEAD:-localhost}:${PORT:-29500}" \
    --rdzv_id="${RUN:?name this launch, the same on all machines: RUN=xl-1}" train.py "$@"
