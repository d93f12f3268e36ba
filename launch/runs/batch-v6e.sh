#!/usr/bin/env bash
# Usage: launch/runs/batch-v6e.sh [VERB [OPTION]...] [-- KEY=VALUE...]
#        launch/runs/batch-v6e.sh --dry-run
#
# Batch generation with the open weights, as int8, on v6e 4x4: 16 chips, 4 hosts, which hold one model
# together; on spot about USD 9 to 22 an hour. Reads from the bucket: grok-1/ckpt-0,
# grok-1/tokenizer.model and prompts/*.jsonl; writes answers. Without a verb: babysit, until every
# prompt has its answer. Keys after -- are added to its command.
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
