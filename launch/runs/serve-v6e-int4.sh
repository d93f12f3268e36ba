#!/usr/bin/env bash
# Usage: launch/runs/serve-v6e-int4.sh [VERB [OPTION]...] [-- KEY=VALUE...]
#        launch/runs/serve-v6e-int4.sh tunnel
#        launch/runs/serve-v6e-int4.sh --dry-run
#
# Serves the open weights, their experts as int4, on v6e 2x4: the 8 chips of one host; about USD 4 to 11 per
# hour on spot, until `down`. Reads grok-1/ckpt-0 and grok-1/tokenizer.model from the bucket, and keeps
# compiled programs there. Without a verb: babysits until `stop`; `tunnel` makes http://127.0.0.1:8000 of
# this machine the server. Keys after -- are added to its command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

parse_common "$@"
export LAUNCH_NAME=grok-serve-int4 LAUNCH_ACCELERATOR=v6e-8 LAUNCH_RUNTIME='' LAUNCH_NODE_COUNT=1
load_settings

worked_run \
  grok serve decode-v6e-2x4-int4 \
  weights="$LAUNCH_BUCKET/grok-1/ckpt-0" \
  tokenizer="$LAUNCH_BUCKET/grok-1/tokenizer.model" \
  chat_template=grok-1 name=grok-1 port=8000 \
  compile_cache="$LAUNCH_BUCKET/grok-1/compiled"
