#!/usr/bin/env bash
# Usage: launch/runs/calibrate.sh [VERB [OPTION]...] [-- KEY=VALUE...]
#        LAUNCH_ACCELERATOR=v6e-8 launch/runs/calibrate.sh
#        launch/runs/calibrate.sh --dry-run
#
# Measures the slice of the settings with `grok calibrate`: about a quarter of an hour of it, by estimate, and
# twenty minutes at most. Writes calibrations/ACCELERATOR.json to the bucket for `grok plan --calibration`,
# prints the verdict, and deletes the slice, also after Ctrl-C. Without a verb: all of that. Keys after -- are
# added to its command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

# Prints the end of the run's output and deletes the slice, if one was requested.
take_down() {
  local code=$?
  trap - EXIT
  [[ $dry_run || -s $state_dir/history ]] || exit "$code"
  call_verb logs --lines 40 || true
  call_verb down || code=1
  exit "$code"
}

parse_common "$@"
# A start that shows no step is one without progress: two, in case a spot slice is preempted.
export LAUNCH_NAME=grok-calibrate LAUNCH_MAX_STALLS=2 LAUNCH_MOUNT=no
load_settings

[[ ${args[0]:-babysit} != babysit ]] || trap take_down EXIT
worked_run \
  timeout --kill-after=60 1200 grok calibrate \
  --out "$LAUNCH_BUCKET/calibrations/$LAUNCH_ACCELERATOR.json" \
  mesh.slice="$LAUNCH_NODE_COUNT"
