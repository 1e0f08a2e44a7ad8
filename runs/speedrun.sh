#!/usr/bin/env bash
# The whole path on a machine with GPUs: text -> pretraining -> chats -> preferences -> quantization -> evaluation.
#   bash runs/speedrun.sh                                 # 124M parameters, FineWeb-Edu, all GPUs of this machine
#   PRESET=llama-1b PARALLEL=fsdp NAME=llama-1b bash runs/speedrun.sh
#   DRY=1 bash runs/speedrun.sh                           # only print the commands, and what the training needs
# SFT, PREFERENCES, TASKS: files of your own (chats; prompt, chosen, rejected; prompt, answer), REWARD: FILE.py:FUNCTION.
# Stages without their file are left out. Run it again after an interruption: finished stages are skipped, trainings resume.
# Not run on GPUs by us yet; its dry run is tested.
set -euo pipefail
cd "$(dirname "$0")/.."
PRESET=${PRESET:-gpt2} NAME=${NAME:-$PRESET} DATASET=${DATASET:-fineweb-edu} FILES=${FILES:-4} VOCAB=${VOCAB:-32768}
PARALLEL=${PARALLEL:-ddp} out=out/$NAME

stage() {       # stage FILE COMMAND...: run the command unless its file is there
    local done=$1; shift
    if [ -n "${DRY:-}" ]; then printf '%s\n' "$*"; return; fi
    if [ -e "$done" ]; then printf '=== %s is there\n' "$done"; return; fi
    printf '\n=== %s\n' "$*"; "$@"
}
train() {       # train FOLDER COMMAND...: a training, which continues from its newest checkpoint
    local folder=$1; shift
    if compgen -G "$folder/state/step-*" > /dev/null && [ ! -e "$folder/done" ]; then set -- "$@" --resume; fi
    stage "$folder/done" "$@"
    [ -n "${DRY:-}" ] || touch "$folder/done"
}

stage "data/$DATASET/meta.json" python prepare.py "$DATASET" --files="$FILES" --vocab_size="$VOCAB" --special_tokens
[ -z "${DRY:-}" ] || printf '%s\n' "python train.py --preset=$PRESET --dry_run      # memory and time before it starts"
train "$out" bash runs/node.sh --preset="$PRESET" --dataset="$DATASET" --out="$out" --parallel="$PARALLEL"
model=$out
if [ -n "${SFT:-}" ]; then
    train "$out-sft" python finetune_lora.py --model="$model" --dataset="$SFT" --method=full --out="$out-sft"
    model=$out-sft
fi
if [ -n "${PREFERENCES:-}" ]; then
    train "$out-dpo" python rlhf.py dpo --model="$model" --dataset="$PREFERENCES" --max_steps=1000 --out="$out-dpo"
    model=$out-dpo
fi
if [ -n "${TASKS:-}" ]; then
    train "$out-grpo" python rlhf.py grpo --model="$model" --dataset="$TASKS" --reward="${REWARD:?REWARD=FILE.py:FUNCTION}" \
        --max_new_tokens=512 --max_steps=500 --out="$out-grpo"
    model=$out-grpo
fi
stage "$out-int4/config.json" python quantize.py --model="$model" --calibration="data/$DATASET" --out="$out-int4"
stage "out/evaluation-$NAME/results.json" python evaluate.py --model "$out" $([ "$model" = "$out" ] || echo "$model") "$out-int4" --dataset="$DATASET" \
    --tasks hellaswag arc_easy piqa --out="out/evaluation-$NAME"
printf '\nNext: python serve.py --model=%s\n' "$out-int4"
