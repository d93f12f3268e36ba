#!/usr/bin/env bash
# Usage: launch/tunnel.sh [PORT]
#
# Forwards a port of this machine (default: the server's) to the server on the first worker, until Ctrl-C:
# http://127.0.0.1:PORT then answers here, and no port of the slice is open to others. Reconnects when
# the slice was recreated, or the connection was lost.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$launch_dir/provider.sh"

# Sets `server` to HOST:PORT, as the worker sees it, by the run that was started here; else to the default
# of grok serve.
read_server() {
  local unit=serve
  server=127.0.0.1:8000
  [[ ! -f $state_dir/progress ]] || read -r unit server <"$state_dir/progress"
  [[ $unit == serve ]] || refuse "the run of $LAUNCH_NAME is no server; grok serve would be one"
}

parse_common "$@"
((${#args[@]} <= 1 && ${#command[@]} == 0)) || refuse "unknown argument; see $verb.sh --help"
load_settings
read_server
port=${args[0]:-${server##*:}}
[[ $port =~ ^[1-9][0-9]{0,4}$ ]] || refuse "'$port' is no port; 8000 would be one"
tunnel_command "$port" "$server"
if [[ $dry_run ]]; then quoted "${gcloud[@]}" && exit; fi
while true; do
  log "http://127.0.0.1:$port is the server while this runs"
  "${gcloud[@]}" </dev/null 2> >(filter_errors) || true
  log "the tunnel is closed; trying again in $LAUNCH_POLL_SECONDS s"
  sleep "$LAUNCH_POLL_SECONDS"
done
