#!/usr/bin/env bash
# The whole path on a laptop: text -> tokenizer -> token shards -> trained GPT -> samples. `make shakespeare` runs this.
# STEPS=100 makes it shorter. Without network the text is the library of your own Python.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n=== %s\n' "$*"; }

say "1. Text and tokenizer: learn 512 tokens from the text, then encode the text as token ids"
if python prepare.py shakespeare --vocab_size=512 --tries=1; then
    name=shakespeare prompt='ROMEO:'
else
    echo "Shakespeare is not on this machine and cannot be downloaded now. The model learns Python from Python's own library."
    python prepare.py stdlib --vocab_size=512
    name=stdlib prompt='def main():'
fi

say "2. Train a GPT on it"
steps=${STEPS:-1000} run="out/$name"
same() {    # does the run in $run have these settings and this text?
    grep -qs "\"max_steps\": $steps," "$run/manifest.json" &&
        grep -qs "$(grep -o '"tokenizer_hash": "[0-9a-f]*"' "data/$name/meta.json")" "$run/manifest.json"
}
if same && [ -d "$run/state/step-$(printf %07d "$steps")" ]; then
    echo "$run is trained already. To train again: python train.py --dataset=$name"
elif same && compgen -G "$run/state/step-*" > /dev/null; then
    python train.py --out="$run" --resume            # continue an interrupted run
else
    python train.py --dataset="$name" --max_steps="$steps"
fi

say "3. Sample from it"
python sample.py --model="$run" --prompt="$prompt" --max_new_tokens=200

say "Done. The loss curve is $run/loss.png. More to try:"
cat <<NEXT
python sample.py --model=$run --prompt='$prompt' --temperature=0.6 --num_samples=3 --max_new_tokens=60
python sample.py --model=$run --prompt='$prompt' --max_new_tokens=6 --temperature=0.9 --show_probs
python train.py --dataset=$name --dry_run
python model.py --summary=$run
NEXT
if [ "$name" != shakespeare ]; then
    echo "Where README.md names shakespeare, use --dataset=$name and --model=$run, or prepare it once there is a network:"
    echo "python prepare.py shakespeare --vocab_size=512"
fi
