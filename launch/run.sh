#!/usr/bin/env bash
# Usage: launch/run.sh -- COMMAND [ARGUMENT]...
#        launch/run.sh -- grok train grok-1b folder=gs://my-bucket/runs/first
#
# Starts the command on all workers, in the code that `sync` brought, detached: it goes on when this
# machine sleeps. Arguments arrive as they are here. The variables that LAUNCH_ENV names travel with
# it, in a file that only the worker's user can read. Nothing starts where something runs already.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$launch_dir/provider.sh"
source "$launch_dir/workers.sh"

# The files that travel: the command, the variables, and where to look for its progress.
write_what_travels() {
  local name word progress=
  for word in "${command[@]}"; do
    case $word in
      folder=*) progress="step ${word#folder=}" ;;
      output=*) progress="shard ${word#output=}" ;;
    esac
  done
  [[ $progress ]] ||
    say "the command has no folder= or output=: status shows no progress, and to babysit no start brings any"
  for name in $LAUNCH_ENV; do
    [[ -n ${!name+set} ]] || refuse "LAUNCH_ENV names $name, which is not set here: export it, or leave it out"
  done
  if [[ $dry_run ]]; then
    printf '# command.sh: exec %s\n' "$(quoted "${command[@]}")"
    printf '# env: %s (values are not shown)\n' "${LAUNCH_ENV:-no variables}"
    return
  fi
  make_state_dir
  (
    umask 077
    mkdir -p "$outgoing"
    printf '%s\n' "exec $(quoted "${command[@]}")" >"$outgoing/command.sh"
    for name in $LAUNCH_ENV; do printf '%s=%s\n' "$name" "$(quoted "${!name}")"; done >"$outgoing/env"
    printf '%s\n' "$progress" | tee "$outgoing/progress" >"$state_dir/progress"
  )
}

refuse_a_second_run() {
  local report
  ask_workers status || fail "all workers are needed; see $(typed status)"
  for report in "${reports[@]}"; do
    [[ $(value_of state "$report") != running ]] ||
      fail "a run is live on ${report%% *} (pid $(value_of pid "$report")): $(typed stop) first"
  done
}

parse_common "$@"
((${#command[@]} && ${#args[@]} == 0)) || refuse "what to run comes after --, as in: launch/run.sh -- grok train grok-1b"
load_settings
outgoing=$state_dir/outgoing
trap 'rm -rf "$outgoing"' EXIT
write_what_travels
refuse_a_second_run
copy_to_workers grok-launch/incoming/ "$outgoing/command.sh" "$outgoing/env" "$outgoing/progress" ||
  fail "not all workers could be reached; nothing was started, the same command may be repeated"
all_workers start
say "started on $(counted "$workers" worker); see $(typed logs) --follow and $(typed status)"
