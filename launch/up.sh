#!/usr/bin/env bash
# Usage: launch/up.sh
#
# Makes the slice of the settings exist and be ready: takes the one that is active, replaces one
# that failed or was taken away (a suspended spot slice never comes back), and waits, saying for
# what. LAUNCH_NODE_COUNT slices are asked for at once.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$launch_dir/provider.sh"

created=
unanswered=0

create() {
  say "asking for $LAUNCH_NODE_COUNT x $LAUNCH_ACCELERATOR ($LAUNCH_PROVISIONING) in $LAUNCH_ZONE"
  create_slice || fail "gcloud refused to create the slice, for the reason above"
  created=1
}

replace() {
  say "deleting the slice, $1, to create it again"
  note_history end "$(date +%s)"
  delete_slice || fail "the slice was not deleted, for the reason above"
  created=''
}

# True when every node of the active slice is ready; replaces a slice that has lost one.
nodes_are_ready() {
  local node state since nodes ready=1
  if [[ -n $slice_accelerator && $slice_accelerator != "$LAUNCH_ACCELERATOR" ]]; then
    fail "$LAUNCH_NAME is a $slice_accelerator, not a $LAUNCH_ACCELERATOR: $(typed down) first, or another LAUNCH_NAME"
  fi
  nodes=$(look_at_nodes)
  while read -r node state _ _ since; do
    case $state in
      READY) note_history begin "$since" ;;
      PREEMPTED | TERMINATED | STOPPED)
        replace "its node $node being $state"
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
    look_at_slice
    waiting_for=$slice_state
    case $slice_state in
      ABSENT)
        [[ -z $created ]] || fail "$LAUNCH_NAME was deleted by someone else while it was waited for"
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
        replace "which was taken away"
        continue
        ;;
      UNKNOWN)
        ((++unanswered < LAUNCH_BAD_POLLS)) || fail "gcloud does not answer: $slice_message"
        waiting_for="no answer ($slice_message)"
        ;;
    esac
    wait_for "$LAUNCH_NAME to be ready" "$waiting_for" "$since"
  done
}

parse_common "$@"
no_more_args
load_settings
if [[ $dry_run ]]; then
  look_at_slice
  create
  look_at_nodes
else
  wait_until_ready
  say "$LAUNCH_NAME is ready: $LAUNCH_NODE_COUNT x $LAUNCH_ACCELERATOR, $(counted "$workers" worker), $(counted $((chips * LAUNCH_NODE_COUNT)) chip)"
fi
