#!/usr/bin/env bash
# Usage: launch/runs/serve-v6e.sh [VERB [OPTION]...] [-- KEY=VALUE...]
#        launch/runs/serve-v6e.sh tunnel
#        launch/runs/serve-v6e.sh --dry-run
#
# Serves the open weights, as int8, on v6e 4x4: 16 chips on 4 hosts hold one replica; about USD 9 to 22 per
# hour on spot, until `down`. Reads grok-1/ckpt-0 and grok-1/tokenizer.model from the bucket, and keeps
# compiled programs there. Without a verb: babysits until `stop`; `tunnel` makes http://127.0.0.1:8000 of
# this machine the server. Keys after -- are added to its command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

parse_common "$@"
export LAUNCH_NAME=grok-serve LAUNCH_ACCELERATOR=v6e-16 LAUNCH_RUNTIME='' LAUNCH_NODE_COUNT=1
load_settings

worked_run \
  grok serve decode-v6e-4x4 \
  weights="$LAUNCH_BUCKET/grok-1/ckpt-0" \
  tokenizer="$LAUNCH_BUCKET/grok-1/tokenizer.model" \
  chat_template=grok-1 name=grok-1 port=8000 \
  compile_cache="$LAUNCH_BUCKET/grok-1/compiled"
