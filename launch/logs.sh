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
if [[ $dry_run ]]; then
  quoted "${gcloud[@]}"
elif [[ $follow ]]; then
  exec "${gcloud[@]}" 2> >(filter_errors)
else
  limited "${gcloud[@]}" 2> >(filter_errors) | sed '/^\[[^]]*\] @ ok$/d; s/ @ failed=/ /'
fi
