#!/usr/bin/env bash
# Usage: launch/stop.sh [--now]
#
# Asks the run on all workers to save and exit (SIGTERM), waits up to LAUNCH_STOP_SECONDS, then kills
# whatever still holds the TPU's device files and removes libtpu's lock file. --now kills at once. Ends
# the babysitter, too, also while it waits for a slice. The slice stays, and costs money, until down.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$launch_dir/provider.sh"
source "$launch_dir/workers.sh"

# Without an active slice no run is live; the babysitter sees at its next poll that it must end.
no_run_is_live() {
  if [[ $slice_state == ABSENT ]]; then
    log "no run is live: there is no slice $LAUNCH_NAME in $LAUNCH_ZONE"
  else
    log "no run is live: $LAUNCH_NAME is $slice_state; it stays, and may cost money, until $(verb_path down)"
  fi
  exit
}

parse_common "$@"
case ${args[*]} in
  '') now= ;;
  --now) now=1 ;;
  *) refuse "unknown argument '${args[*]}'; see stop.sh --help" ;;
esac
load_settings
seconds=$LAUNCH_STOP_SECONDS
[[ -z $now ]] || seconds=0
make_state_dir
[[ $dry_run ]] || write_request stop
describe_slice
case $slice_state in
  ACTIVE | UNKNOWN) ;;
  *) [[ $dry_run ]] || no_run_is_live ;;
esac
# ssh must outlive the worker's own timeout.
LAUNCH_CALL_SECONDS=$((LAUNCH_CALL_SECONDS + seconds))
if [[ $now ]]; then log "ending the run at once"; else log "stopping; this may take $(duration "$seconds") while the run saves"; fi
call_all_workers stop "$seconds"
for report in "${reports[@]}"; do
  printf '%s: %s, exit code %s, ended %s\n' "${report%% *}" "$(value_of state "$report")" \
    "$(value_of code "$report")" "$(value_of ended "$report")"
done
