#!/usr/bin/env bash
# Usage: launch/runs/continue-v5p.sh [VERB [OPTION]...] [-- KEY=VALUE...]
#        launch/runs/continue-v5p.sh -- train.steps=2000
#        launch/runs/continue-v5p.sh status
#
# Continued pretraining of the open weights on v5p 4x4x8: 128 chips, 32 hosts, one sequence of 8192 tokens
# per chip; about USD 110 to 215 per hour on spot. The step was compiled for this slice ahead of time and
# fits; it was never run on one. Reads ckpt-0, tokenizer.model, data/train and data/held-out (datasets
# prepared with that tokenizer) from grok-1 in the bucket. Without a verb: babysits until the run is done.
# Keys after -- are added to its command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

parse_common "$@"
export LAUNCH_NAME=grok-continue LAUNCH_ACCELERATOR=v5p-256 LAUNCH_RUNTIME='' LAUNCH_NODE_COUNT=1
load_settings

worked_run \
  grok train grok-1 \
  folder="$LAUNCH_BUCKET/runs/continue" \
  train.init_from="$LAUNCH_BUCKET/grok-1/ckpt-0" \
  data.datasets="[{path: $LAUNCH_BUCKET/grok-1/data/train, weight: 1}]" \
  data.validation_dataset="$LAUNCH_BUCKET/grok-1/data/held-out" \
  data.tokenizer="$LAUNCH_BUCKET/grok-1/tokenizer.model" \
  data.sequence_length=8192 data.batch_size=128 \
  mesh.data=16 mesh.expert=8 \
  optimizer.peak_lr=1e-5 optimizer.warmup_steps=200 \
  train.steps=5000 train.eval_every=500 \
  checkpoint.every=100 checkpoint.keep=2
