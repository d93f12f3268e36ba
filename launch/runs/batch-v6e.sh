#!/usr/bin/env bash
# Usage: launch/runs/batch-v6e.sh [VERB [OPTION]...]
#        launch/runs/batch-v6e.sh --dry-run
#
# Batch generation with the open weights, as int8, on v6e 4x4: 16 chips, 4 hosts. Calls `grok batch`,
# which this version of grok does not have yet: until it does, this is for --dry-run. Reads from the
# bucket: grok-1/ckpt-0, grok-1/tokenizer.model and prompts; writes answers. Without a verb: babysit,
# until the run is done.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

parse_common "$@"
export LAUNCH_NAME=grok-batch LAUNCH_ACCELERATOR=v6e-16 LAUNCH_RUNTIME='' LAUNCH_NODE_COUNT=1
# No steps are counted here, so that every start would seem to have stalled.
export LAUNCH_MOUNT=yes LAUNCH_MAX_STALLS=100
load_settings

command=(
  grok batch "$LAUNCH_BUCKET/grok-1/ckpt-0"
  --tokenizer bucket/grok-1/tokenizer.model
  --prompts "$LAUNCH_BUCKET/prompts"
  --out "$LAUNCH_BUCKET/answers"
  --dtype int8
  mesh.expert=2 mesh.tensor=8
)
worked_run
