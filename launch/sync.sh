#!/usr/bin/env bash
# Usage: launch/sync.sh [--again]
#
# Brings the code to all workers: a tarball of the commit, stamped with its hash. With changes that
# are not committed, those go too, and the stamp says dirty; files that git does not know stay here.
# --again sends the tarball of last time, whatever has become of the tree since.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$launch_dir/provider.sh"
source "$launch_dir/workers.sh"

# Sets stamp and what, a commit that holds the tree as it is.
stamp_the_tree() {
  local changes untracked
  what=$(git -C "$root" rev-parse HEAD)
  stamp=${what:0:12}
  # A commit of the changes that no branch points to; the tree and the index stay as they are.
  changes=$(git -C "$root" -c user.name=launch -c user.email=launch@localhost stash create)
  if [[ $changes ]]; then
    what=$changes
    stamp+=-dirty-$(git -C "$root" rev-parse --short=8 "$changes^{tree}")
    say "the tree has changes that are not committed; they go too, as $stamp"
  fi
  untracked=$(git -C "$root" ls-files --others --exclude-standard | wc -l)
  ((untracked == 0)) || say "$(counted $((untracked)) file) unknown to git stay here (git add them)"
}

parse_common "$@"
load_settings
make_state_dir
if [[ ${args[*]} == --again ]]; then
  [[ -f $state_dir/stamp ]] || refuse "nothing was sent to $LAUNCH_NAME before; leave out --again"
  stamp=$(<"$state_dir/stamp")
else
  no_more_args
  stamp_the_tree
  run git -C "$root" archive --format=tar.gz --output="$state_dir/grok-$stamp.tar.gz" "$what"
  [[ $dry_run ]] || echo "$stamp" >"$state_dir/stamp"
fi
copy_to_workers grok-launch/incoming/ "$state_dir/grok-$stamp.tar.gz" ||
  fail "not all workers could be reached (was $(typed setup) run?); the same command may be repeated"
all_workers unpack "$stamp"
say "$(counted "$workers" worker) at $stamp"
