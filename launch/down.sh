#!/usr/bin/env bash
# Usage: launch/down.sh
#
# Deletes the slice in any state, whatever runs on it; it costs nothing from then on. Files at gs:// stay.
# Ends the babysitter, too.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$launch_dir/provider.sh"

# If the history has a slice, it was deleted by other means or still costs money in another zone.
slice_is_absent() {
  local noted zone
  read -r noted _ _ _ _ zone < <(tail -n 1 "$state_dir/history" 2>/dev/null) || noted=''
  if [[ $noted == begin ]]; then
    [[ $zone == "$LAUNCH_ZONE" ]] ||
      fail "there is no slice $LAUNCH_NAME in $LAUNCH_ZONE; the one created in $zone may still cost money: LAUNCH_ZONE=$zone $(verb_path down)"
    record_history end "$(date +%s)"
  fi
  log "there is no slice $LAUNCH_NAME in $LAUNCH_ZONE"
  exit
}

parse_common "$@"
no_more_args
load_settings
make_state_dir
[[ $dry_run ]] || write_request down $$
describe_slice
case $slice_state in
  UNKNOWN) fail "gcloud does not answer, and the slice may still cost money: $slice_message" ;;
  ABSENT) [[ $dry_run ]] || slice_is_absent ;;
esac
delete_slice || fail "the slice was not deleted and may still cost money; the reason is above"
[[ $dry_run ]] || record_history end "$(date +%s)"
log "$LAUNCH_NAME is deleted"
