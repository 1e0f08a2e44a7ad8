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
steps=${STEPS:-1000}
if ! grep -qs "\"max_steps\": $steps," "out/$name/manifest.json"; then
    python train.py --dataset="$name" --max_steps="$steps"
elif [ -d "out/$name/state/step-$(printf %07d "$steps")" ]; then
    echo "out/$name is trained already; to train again: python train.py --dataset=$name"
else
    python train.py --out="out/$name" --resume      # an earlier run was interrupted: go on where it stopped
fi

say "3. Let it write"
python sample.py --model="out/$name" --prompt="$prompt" --max_new_tokens=200

say "Done. Look at out/$name/loss.png, then try"
echo "python sample.py --model=out/$name --prompt='$prompt' --temperature=0.6 --num_samples=3"
