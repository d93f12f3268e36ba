#!/usr/bin/env bash
# Usage: launch/status.sh
#
# Shows the slice and its nodes, the state of the workers, and the newest step and loss, the finished
# shards of a batch, or the health of a server. Exits with 0 if the cloud answered.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$launch_dir/provider.sh"
source "$launch_dir/workers.sh"

line() { printf '%-9s%s\n' "$1" "$2"; }

show_nodes() {
  local node state health hosts_there created up
  while read -r node state health hosts_there created; do
    up=
    [[ -z $created ]] || up=", up $(duration $(($(date +%s) - created)))"
    line node "$node $state $health, $(plural "$hosts_there" host)$up"
  done < <(list_nodes)
}

# Prints the number of workers in each state, and the code that they have.
show_workers() {
  local report state key
  local -A count=()
  for report in "${reports[@]}"; do
    state=$(value_of state "$report")
    [[ $state != exited ]] || state="exited with $(value_of code "$report")"
    count[$state]=$((${count[$state]:-0} + 1))
  done
  for key in "${!count[@]}"; do line workers "${count[$key]} of $workers $key"; done | sort
  line code "$(value_of stamp "${reports[0]}")"
}

parse_common "$@"
no_more_args
load_settings
describe_slice
if [[ $dry_run ]]; then
  list_nodes
  call_workers status
  exit
fi
line slice "$LAUNCH_NAME $LAUNCH_NODE_COUNT x $LAUNCH_ACCELERATOR $LAUNCH_PROVISIONING $LAUNCH_ZONE $slice_state${slice_message:+: $slice_message}"
[[ $slice_state != UNKNOWN ]] || exit 1
[[ $slice_state == ACTIVE ]] || exit 0
show_nodes
call_workers status || true
((${#reports[@]})) || exit 0
show_workers
read_progress
where=$(sed -n 's/^[a-z]* /, in /p' "$state_dir/progress" 2>/dev/null || true)
if [[ $unit == shard ]]; then
  line run "$progress of $total shards$where"
elif [[ $unit == serve ]]; then
  if [[ $progress == - ]]; then health="does not answer at /health (yet)"; else health="is healthy"; fi
  line run "the server${where/, in/ at} of the first worker $health; $(verb_path tunnel) reaches it"
else
  if [[ $slow == - ]]; then held_up=""; else held_up=", held up by host $slow"; fi
  line run "step $progress, loss $loss$held_up$where"
fi
