#!/usr/bin/env bash
# Usage: launch/up.sh
#
# Creates the slice of the settings and waits until it is ready. Reuses an active one; replaces one that
# failed or was preempted (a suspended spot slice never comes back). Requests LAUNCH_NODE_COUNT slices
# at once, and says what they cost. Refuses the example's settings.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$launch_dir/provider.sh"
source "$launch_dir/preflight.sh"

created=
failed_polls=0

# Ends the babysitter's `up` once stop.sh or down.sh was called: a slice that came later would cost money.
fail_if_stopped() {
  [[ ${LAUNCH_BABYSITTER:-} && -e $state_dir/stopped ]] || return 0
  [[ ! $created ]] || fail "asked to stop: not waiting for the slice that was requested"
  fail "asked to stop: no slice is requested, and none waited for"
}

create() {
  local cost
  cost=$(price) || exit
  log "requesting $LAUNCH_NODE_COUNT x $LAUNCH_ACCELERATOR ($LAUNCH_PROVISIONING) in $LAUNCH_ZONE"
  log "$cost"
  [[ $dry_run ]] || fail_if_stopped
  create_slice || fail "gcloud refused to create the slice; the reason is above"
  created=1
}

replace() {
  log "deleting the slice, $1, to recreate it"
  record_history end "$(date +%s)"
  delete_slice || fail "the slice was not deleted; the reason is above"
  created=''
}

# True if every node of the active slice is ready; replaces a slice that has lost one.
nodes_are_ready() {
  local node state since nodes ready=1
  if [[ -n $slice_accelerator && $slice_accelerator != "$LAUNCH_ACCELERATOR" ]]; then
    fail "$LAUNCH_NAME is a $slice_accelerator, not a $LAUNCH_ACCELERATOR: $(verb_path down) first, or another LAUNCH_NAME"
  fi
  nodes=$(list_nodes)
  while read -r node state _ _ since; do
    case $state in
      READY) record_history begin "$since" ;;
      PREEMPTED | TERMINATED | STOPPED)
        replace "whose node $node is $state"
        return 1
        ;;
      *) ready='' waiting_for="node $node is $state" ;;
    esac
  done <<<"$nodes"
  [[ $ready ]]
}

wait_until_ready() {
  local since=$SECONDS waiting_for
  while true; do
    fail_if_stopped
    describe_slice
    waiting_for=$slice_state
    case $slice_state in
      ABSENT)
        [[ -z $created ]] || fail "$LAUNCH_NAME was deleted by someone else during the wait"
        create && continue
        ;;
      ACTIVE)
        if nodes_are_ready; then break; fi
        [[ $waiting_for != ACTIVE ]] || continue
        ;;
      FAILED)
        [[ -z $created ]] || fail "the request failed: $slice_message"
        replace "which failed (${slice_message:-no reason given})"
        continue
        ;;
      SUSPENDED)
        replace "which was preempted"
        continue
        ;;
      UNKNOWN)
        ((++failed_polls < LAUNCH_BAD_POLLS)) || fail "gcloud does not answer: $slice_message"
        waiting_for="no answer ($slice_message)"
        ;;
    esac
    wait_for "$LAUNCH_NAME to be ready" "$waiting_for" "$since"
  done
}

parse_common "$@"
no_more_args
load_settings
refuse_example_settings
if [[ $dry_run ]]; then
  describe_slice
  create
  list_nodes
else
  # An `up` of the user's after `down` is the newer request: a babysitter that still ends leaves its slice.
  [[ ${LAUNCH_BABYSITTER:-} || ! -e $state_dir/stopped ]] || write_request up
  wait_until_ready
  log "$LAUNCH_NAME is ready: $LAUNCH_NODE_COUNT x $LAUNCH_ACCELERATOR, $(plural "$workers" worker), $(plural $((chips * LAUNCH_NODE_COUNT)) chip)"
fi
