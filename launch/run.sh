#!/usr/bin/env bash
# Usage: launch/run.sh -- COMMAND [ARGUMENT]...
#        launch/run.sh -- grok train first.yaml folder=gs://my-bucket/runs/first
#
# Starts the command on all workers, detached, with the code of the last `sync`: it continues when this
# machine sleeps. Arguments arrive unchanged. Variables that LAUNCH_ENV names are sent in a file that
# only the worker's user can read. Refuses to start while another run is live, a grok command whose config
# does not hold (where grok is installed here: make env), and a gs:// bucket that does not exist.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$launch_dir/provider.sh"
source "$launch_dir/workers.sh"
source "$launch_dir/preflight.sh"

# Sets `progress` to where the run's progress shows: a folder, or the server's address.
find_progress() {
  local word host=127.0.0.1 port=8000
  progress=
  for word in "${command[@]}"; do
    case $word in
      folder=*) progress="step ${word#folder=}" ;;
      output=*) progress="shard ${word#output=}" ;;
      host=*) host=${word#host=} ;;
      port=*) port=${word#port=} ;;
    esac
  done
  if [[ $subcommand == serve ]]; then
    host=$(checked_value host "$host") port=$(checked_value port "$port")
    [[ $host != 0.0.0.0 && $host != :: ]] || host=127.0.0.1
    [[ $host != *:* ]] || host="[$host]"
    progress="serve $host:$port"
  fi
  [[ $progress ]] ||
    log "the command has no folder= or output=: status and babysit cannot see its progress"
}

# Writes the files to send: the command, the variables, and where its progress shows.
write_outgoing() {
  local name progress
  find_progress
  for name in $LAUNCH_ENV; do
    [[ -n ${!name+set} ]] || refuse "LAUNCH_ENV names $name, which is not set here: export it, or remove it"
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
    printf '%s\n' "$progress" >"$outgoing/progress"
  )
}

refuse_second_run() {
  local report
  call_workers status || fail_unreached "not all workers answered; see $(verb_path status)"
  for report in "${reports[@]}"; do
    [[ $(value_of state "$report") != running ]] ||
      fail "a run is live on ${report%% *} (pid $(value_of pid "$report")): $(verb_path stop) first"
  done
}

parse_common "$@"
((${#command[@]} && ${#args[@]} == 0)) || refuse "put the command after --, for example: launch/run.sh -- grok train first.yaml folder=gs://my-bucket/runs/first"
load_settings
check_command
[[ ${LAUNCH_BABYSITTER:-} ]] || check_buckets
outgoing=$state_dir/outgoing
trap 'rm -rf "$outgoing"' EXIT
write_outgoing
refuse_second_run
copy_to_workers grok-launch/incoming/ "$outgoing/command.sh" "$outgoing/env" "$outgoing/progress" ||
  fail_unreached "not all workers could be reached; nothing was started; retry the same command"
# From here on `status` reads the progress of this run, no longer that of the one before.
[[ $dry_run ]] || cp "$outgoing/progress" "$state_dir/progress"
call_all_workers start
log "started on $(plural "$workers" worker); see $(verb_path logs) --follow and $(verb_path status)"
