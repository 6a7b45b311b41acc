#!/usr/bin/env bash
# Whether an installation works: the whole road with a tiny model, in one process and without a network, in a minute.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m minitron_mcore run --config configs/quickstart.yaml output="$folder" input="$PWD/minitron_mcore" \
  parallel.tensor=1 tokenizer.vocab_size=600 data.sequence_length=64 \
  model.num_layers=2 model.hidden_size=48 model.ffn_hidden_size=96 model.kv_channels=8 \
  train.tokens=16384 train.lr_warmup_iters=1 distill.tokens=8192 distill.lr_warmup_iters=1 evaluate.samples=8 \
  run.students.width.hidden_size=24 run.students.width.ffn_hidden_size=48 run.students.depth.num_layers=1 \
  "run.baselines=[]" generate.max_new_tokens=4
echo "launch/smoke.sh: all is well"
