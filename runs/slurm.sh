#!/usr/bin/env bash
# A cluster with Slurm: sbatch runs/slurm.sh --preset=gpt2-xl --dataset=NAME --out=out/xl --parallel=hsdp
# Before the time limit or a preemption Slurm sends SIGTERM: train.py saves and ends, and the job returns to the queue until
# the run has all its steps. torchrun ends with status 1 after a signal, so the folder of the run is read instead.
#SBATCH --job-name=nanopath
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
out=$(printf '%s\n' "$@" | sed -n 's/^--out=//p')
[ -n "$out" ] || { echo "give the run a folder: sbatch runs/slurm.sh --out=out/NAME ..."; exit 2; }
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
processes=${NPROC:-${SLURM_GPUS_ON_NODE:-8}}
unfinished() {      # are there checkpoints, but none of the last step?
    python - "$out" <<'PY'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
steps = [int(path.name[5:]) for path in out.glob("state/step-*")]
last = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["config"]["max_steps"] if steps else 0
sys.exit(not steps or max(steps) >= last)
PY
}
newest() { { ls -d "$out"/state/step-* 2> /dev/null || true; } | tail -n 1; }
before=$(newest)
resume=()
if unfinished; then resume=(--resume); fi
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1     # a restart gets a new store
trap : TERM         # the processes of srun get the signal too, and act on it
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$processes" --max_restarts=3 --shutdown-timeout=110 \
    --rdzv_backend=c10d --rdzv_endpoint="$head:29500" --rdzv_id="$SLURM_JOB_ID" train.py "$@" ${resume[@]+"${resume[@]}"} || true
if unfinished && [[ ! "$(newest)" > "$before" ]]; then
    echo "no step was saved in this turn: the job is not submitted again"
    exit 1
elif unfinished; then
    echo "stopped early: the job returns to the queue"
    scontrol requeue "$SLURM_JOB_ID"
elif [ ! -d "$out/state" ]; then
    exit 1
fi
