#!/usr/bin/env bash
# Usage: launch/stop.sh [--now]
#
# Asks the run on all workers to save and leave (SIGTERM), waits up to LAUNCH_STOP_SECONDS for it, and
# then ends whatever still holds the TPU, by its device files, and removes libtpu's lock file.
# --now does not ask. A babysitter, if there is one, ends too.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$launch_dir/provider.sh"
source "$launch_dir/workers.sh"

parse_common "$@"
case ${args[*]} in
  '') now= ;;
  --now) now=1 ;;
  *) refuse "what is '${args[*]}'? See stop.sh --help" ;;
esac
load_settings
seconds=$LAUNCH_STOP_SECONDS
[[ -z $now ]] || seconds=0
make_state_dir
[[ $dry_run ]] || touch "$state_dir/stopped"
# ssh may not be cut off before the worker's own time is up.
LAUNCH_CALL_SECONDS=$((LAUNCH_CALL_SECONDS + seconds))
say "stopping; this may take $(duration "$seconds") where a run is saving"
all_workers stop "$seconds"
for report in "${reports[@]}"; do
  printf '%s: %s, exit code %s, ended %s\n' "${report%% *}" "$(value_of state "$report")" \
    "$(value_of code "$report")" "$(value_of ended "$report")"
done
