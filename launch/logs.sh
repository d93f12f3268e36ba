#!/usr/bin/env bash
# Usage: launch/logs.sh [--follow] [--lines N]
#
# Prints the last N lines (20) of the run's output on each worker, prefixed with the worker's name.
# --follow streams until Ctrl-C.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$launch_dir/provider.sh"

parse_common "$@"
lines=20 follow=
set -- "${args[@]}"
while (($#)); do
  case $1 in
    --follow | -f) follow=follow ;;
    --lines)
      [[ ${2:-} =~ ^[0-9]+$ ]] || refuse "--lines needs a number"
      lines=$2 && shift
      ;;
    *) refuse "unknown argument '$1'; see logs.sh --help" ;;
  esac
  shift
done
load_settings
ssh_command bash grok-launch/worker.sh logs "$lines" $follow

# Without the worker's verdict, of which a failure's reason is printed alone. Each line at once: awk
# and sed wait for more of a stream, each system's in its own way.
lines_only() {
  local line
  while IFS= read -r line; do
    [[ $line == '['*'] @ ok' ]] || printf '%s\n' "${line/ @ failed=/ }"
  done
}

if [[ $dry_run ]]; then
  quoted "${gcloud[@]}"
elif [[ $follow ]]; then
  exec "${gcloud[@]}" 2> >(filter_errors) > >(lines_only)
else
  limited "${gcloud[@]}" 2> >(filter_errors) | lines_only
fi
