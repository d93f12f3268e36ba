#!/usr/bin/env bash
# Usage: launch/down.sh
#
# Deletes the slice, whatever state it is in and whatever runs on it: from here on it costs nothing.
# What is at gs:// stays. A babysitter, if there is one, ends too.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$launch_dir/provider.sh"

# Where notes say that there is one, it was deleted by other means, or costs in another zone.
nothing_there() {
  local noted zone
  read -r noted _ _ _ _ zone < <(tail -n 1 "$state_dir/history" 2>/dev/null) || noted=''
  if [[ $noted == begin ]]; then
    [[ $zone == "$LAUNCH_ZONE" ]] ||
      fail "there is no slice $LAUNCH_NAME in $LAUNCH_ZONE; the one made in $zone may still cost: LAUNCH_ZONE=$zone $(typed down)"
    note_history end "$(date +%s)"
  fi
  say "there is no slice $LAUNCH_NAME in $LAUNCH_ZONE"
  exit
}

parse_common "$@"
no_more_args
load_settings
make_state_dir
[[ $dry_run ]] || touch "$state_dir/stopped"
look_at_slice
case $slice_state in
  UNKNOWN) fail "gcloud does not answer, and the slice may still cost: $slice_message" ;;
  ABSENT) [[ $dry_run ]] || nothing_there ;;
esac
delete_slice || fail "the slice was not deleted, for the reason above, and may still cost"
[[ $dry_run ]] || note_history end "$(date +%s)"
say "$LAUNCH_NAME is deleted"
