#!/usr/bin/env bash
# The whole path on a laptop: text -> tokenizer -> token shards -> trained GPT -> samples. `make` runs this.
# STEPS=100 makes it shorter. Without network the text is what every Python carries: its own library.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n=== %s\n' "$*"; }

say "1. Text and tokenizer: 512 tokens learnt from the text, then the text as token ids"
if python prepare.py shakespeare --vocab_size=512 --tries=1; then
    name=shakespeare prompt='ROMEO:'
else
    echo "Shakespeare is not here and cannot be fetched just now, so this run learns Python from Python's own library."
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
    echo "$run is trained already; to train again: python train.py --dataset=$name"
elif same && compgen -G "$run/state/step-*" > /dev/null; then
    python train.py --out="$run" --resume            # it was interrupted: go on where it stopped
else
    python train.py --dataset="$name" --max_steps="$steps"
fi

say "3. Let it write"
python sample.py --model="out/$name" --prompt="$prompt" --max_new_tokens=200

say "Done. Look at out/$name/loss.png, then try"
echo "python sample.py --model=out/$name --prompt='$prompt' --temperature=0.6 --num_samples=3"
