#!/usr/bin/env bash
# Usage: launch/sync.sh [--again]
#
# Sends the code to all workers: a tarball of the commit, stamped with its hash. Uncommitted changes are
# included, and the stamp then says dirty; untracked files are not. --again sends the previous tarball,
# whatever the tree holds now.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$launch_dir/provider.sh"
source "$launch_dir/workers.sh"

# Sets stamp, and commit: a commit that holds the tree as it is.
set_stamp() {
  local changes untracked names
  commit=$(git -C "$root" rev-parse HEAD)
  stamp=${commit:0:12}
  # A commit of the changes on no branch; the tree and the index stay unchanged.
  changes=$(git -C "$root" -c user.name=launch -c user.email=launch@localhost stash create)
  if [[ $changes ]]; then
    commit=$changes
    stamp+=-dirty-$(git -C "$root" rev-parse --short=8 "$changes^{tree}")
    log "uncommitted changes are included, as $stamp"
  fi
  untracked=$(git -C "$root" ls-files --others --exclude-standard)
  [[ $untracked ]] || return 0
  names=$(head -n 3 <<<"$untracked" | paste -sd , - | sed 's/,/, /g')
  untracked=$(wc -l <<<"$untracked")
  ((untracked <= 3)) || names+=", ..."
  log "not sent: $(plural $((untracked)) "untracked file") ($names): git add those that the run imports or reads; data belongs into the bucket"
}

parse_common "$@"
load_settings
make_state_dir
if [[ ${args[*]} == --again ]]; then
  [[ -f $state_dir/stamp ]] || refuse "nothing was sent to $LAUNCH_NAME yet; leave out --again"
  stamp=$(<"$state_dir/stamp")
else
  no_more_args
  set_stamp
  run git -C "$root" archive --format=tar.gz --output="$state_dir/grok-$stamp.tar.gz" "$commit"
  [[ $dry_run ]] || echo "$stamp" >"$state_dir/stamp"
fi
copy_to_workers grok-launch/incoming/ "$state_dir/grok-$stamp.tar.gz" ||
  fail_unreached "not all workers could be reached (was $(verb_path setup) run?); retry the same command"
call_all_workers unpack "$stamp"
log "$(plural "$workers" worker) at $stamp"
