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

# Prints the end of the run's output and deletes the slice. After a refusal the slice, if there is one, belongs
# to another call: that of a live calibration, or an `up`.
take_down() {
  local code=$?
  trap - EXIT
  has_begun "$code" || exit "$code"
  rm -f "$LAUNCH_BEGUN"
  call_verb logs --lines 40 || true
  call_verb down || code=1
  exit "$code"
}

# True once babysit has refused nothing; in a dry run its exit code says so.
has_begun() { if [[ $dry_run ]]; then (($1 == 0)); else [[ -e $LAUNCH_BEGUN ]]; fi; }

babysit_and_take_down() {
  export LAUNCH_BEGUN=$state_dir/begun.$$
  rm -f "$LAUNCH_BEGUN" # of a process that had the same number
  trap take_down EXIT
}

parse_common "$@"
# A start that shows no step is one without progress: two, in case a spot slice is preempted.
export LAUNCH_NAME=grok-calibrate LAUNCH_MAX_STALLS=2 LAUNCH_MOUNT=no
load_settings

[[ ${args[0]:-babysit} != babysit ]] || babysit_and_take_down
worked_run \
  timeout --kill-after=60 1200 grok calibrate \
  --out "$LAUNCH_BUCKET/calibrations/$LAUNCH_ACCELERATOR.json" \
  mesh.slice="$LAUNCH_NODE_COUNT"
