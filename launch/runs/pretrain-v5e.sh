#!/usr/bin/env bash
# Usage: launch/runs/pretrain-v5e.sh [VERB [OPTION]...] [-- KEY=VALUE...]
#        launch/runs/pretrain-v5e.sh -- train.steps=2000
#        launch/runs/pretrain-v5e.sh logs --follow
#
# Pretraining of the 1 B model on v5e-8 spot: one host, 8 chips, about USD 2 to 5 per hour. Reads
# data/tokenizer.model, data/train and data/held-out (prepared datasets) from the bucket. Without a verb:
# babysits until the run is done. Keys after -- are added to its command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

parse_common "$@"
export LAUNCH_NAME=grok-pretrain LAUNCH_ACCELERATOR=v5litepod-8 LAUNCH_RUNTIME='' LAUNCH_NODE_COUNT=1
export LAUNCH_PROVISIONING=spot
load_settings

worked_run \
  grok train grok-1b \
  folder="$LAUNCH_BUCKET/runs/pretrain" \
  data.datasets="[{path: $LAUNCH_BUCKET/data/train, weight: 1}]" \
  data.validation_dataset="$LAUNCH_BUCKET/data/held-out" \
  data.tokenizer="$LAUNCH_BUCKET/data/tokenizer.model" \
  data.sequence_length=4096 data.batch_size=32 \
  mesh.data=8 \
  optimizer.peak_lr=4e-4 optimizer.warmup_steps=1000 \
  train.steps=50000 train.router_balance_loss=0.01 train.eval_every=1000 \
  checkpoint.every=200 checkpoint.keep=2
