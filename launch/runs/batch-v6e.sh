#!/usr/bin/env bash
# Usage: launch/runs/batch-v6e.sh [VERB [OPTION]...] [-- KEY=VALUE...]
#        launch/runs/batch-v6e.sh --dry-run
#
# Batch inference with the open weights, as int8, on v6e 4x4: 16 chips on 4 hosts hold one replica; about
# USD 9 to 22 per hour on spot. Reads grok-1/ckpt-0, grok-1/tokenizer.model and prompts/*.jsonl from the
# bucket; writes answers. Without a verb: babysits until every prompt is answered. Keys after -- are added
# to its command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

parse_common "$@"
export LAUNCH_NAME=grok-batch LAUNCH_ACCELERATOR=v6e-16 LAUNCH_RUNTIME='' LAUNCH_NODE_COUNT=1
load_settings

worked_run \
  grok batch grok-1-v6e \
  weights="$LAUNCH_BUCKET/grok-1/ckpt-0" \
  tokenizer="$LAUNCH_BUCKET/grok-1/tokenizer.model" \
  input="[$LAUNCH_BUCKET/prompts/*.jsonl]" \
  output="$LAUNCH_BUCKET/answers"
