#!/usr/bin/env bash
# Usage: launch/babysit.sh -- COMMAND [ARGUMENT]...
#        launch/babysit.sh
#
# Keeps a run going until it is done: creates the slice, sets it up, sends the code, starts the command,
# and polls it every LAUNCH_POLL_SECONDS. Recreates a preempted slice, and restarts a run as its exit
# code says:
#
#   0       done: babysit exits with 0
#   2, 65   something must be changed first (config or data; divergence): babysit exits with that code
#   75      saved and stopped: restarted, unless launch/stop.sh or down.sh stopped it (then exits with 75)
#   other   restarted with exponential backoff
#
# Before anything costs money: refuses a grok command whose config does not hold or whose mesh does not fit the
# slice (where grok is installed here: make env), a folder on a worker's disk, and a gs:// bucket that does
# not exist; says the price.
#
# Gives up, with 1, after LAUNCH_MAX_STALLS consecutive starts without a new step (batch: without a new
# shard of answers; server: without an answer at /health), read from the folder= or output= of the command.
# A server that was healthy and no longer answers at /health is restarted. If babysit itself is killed, call
# it again without a command, or with the same one, and it continues; run it in tmux, or under anything
# that restarts it. Restarts use the code of the first start, not the current tree.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$launch_dir/provider.sh"
source "$launch_dir/workers.sh"
source "$launch_dir/verdict.sh"
source "$launch_dir/preflight.sh"

# Saves the state to $state_dir/babysit: the slice that is set up, starts so far, starts without
# progress, the newest step or number of shards, and whether a run is under way.
save_state() {
  printf 'prepared=%q\nstarts=%q\nstalls=%q\nbest=%q\nunder_way=%q\n' \
    "$prepared" "$starts" "$stalls" "$best" "$under_way" >"$state_dir/babysit.new"
  mv "$state_dir/babysit.new" "$state_dir/babysit"
}

load_state() {
  prepared='' starts=0 stalls=0 best=0 under_way='' pause=''
  # shellcheck source=/dev/null
  [[ ! -f $state_dir/babysit ]] || source "$state_dir/babysit"
}

# Without a command, sets `command` to that of the unfinished run; refuses another one meanwhile.
resolve_command() {
  local before
  before=$(cat "$state_dir/command" 2>/dev/null || true)
  if ((${#command[@]} == 0)); then
    [[ $before ]] || refuse "put the command after --, for example: launch/babysit.sh -- grok train first.yaml folder=gs://my-bucket/runs/first"
    eval "command=($before)" # written by `quoted`, below
  elif [[ $(quoted "${command[@]}") != "$before" ]]; then
    [[ ! -f $state_dir/babysit ]] ||
      refuse "$LAUNCH_NAME runs another command ($before): repeat that one, or $(verb_path stop) first"
  fi
}

only_one_babysitter() {
  local other
  other=$(cat "$state_dir/babysit.pid" 2>/dev/null || true)
  # After a reboot the pid may belong to another process.
  [[ -z $other || $(ps -ww -o args= -p "$other") != *babysit.sh* ]] ||
    refuse "process $other on this machine already babysits $LAUNCH_NAME"
  echo $$ >"$state_dir/babysit.pid"
}

# Exits and forgets the state; the next babysit starts from the beginning.
finish() {
  rm -f "$state_dir/babysit" "$state_dir/babysit.pid" "$state_dir/command"
  log "${*:2}$(remaining_cost)"
  exit "$1"
}

# Prints the end of a message: whether a slice stays, and the command that deletes it.
remaining_cost() {
  describe_slice
  case $slice_state in
    ABSENT) ;;
    ACTIVE) echo "; the slice stays, and costs money, until $(verb_path down)" ;;
    *) echo "; the slice ($slice_state) may stay, and cost money, until $(verb_path down)" ;;
  esac
}

# Exits if stop.sh or down.sh was called. `down` sees no slice that is requested in the same moment:
# when it has ended, what is still there is deleted here.
exit_if_stopped() {
  local request pid
  [[ -e $state_dir/stopped ]] || return 0
  while read -r request pid <"$state_dir/stopped" && [[ $request == down ]]; do
    [[ $(ps -ww -o args= -p "$pid") == *down.sh* ]] || break
    sleep "$LAUNCH_POLL_SECONDS"
  done
  describe_slice
  if [[ $request == down && $slice_state != ABSENT ]]; then
    log "deleting the slice that 'down' did not delete"
    delete_lost_slice
  fi
  # The run went on after the last poll, until it was asked to save.
  [[ ! $under_way ]] || update_progress
  finish 75 "asked to stop, $(reached)"
}

# Tries each verb that a new slice needs once; true if the slice is ready for a run.
prepare_slice() {
  local now
  call_verb up || return 1
  exit_if_stopped
  now=$(list_nodes | awk '{ print $1, $5 }' | tr '\n' ' ')
  [[ $now != *'  '* ]] || return 1 # a node without a creation time
  [[ $now != "$prepared" ]] || return 0
  call_verb setup || return 1
  exit_if_stopped
  if ((starts == 0)); then call_verb sync || return 1; else call_verb sync --again || return 1; fi
  prepared=$now under_way=''
  save_state
}

# Resets `stalls` when a new step or shard appears.
update_progress() {
  read_progress
  [[ $progress != - ]] || return 0
  # A server that answers now is progress, even in the second in which the one before did.
  ((progress > best)) || [[ $unit == serve ]] || return 0
  best=$progress stalls=0
  save_state
}

reached() {
  case $(cat "$state_dir/progress" 2>/dev/null || true) in
    shard*) echo "with $(plural "$best" shard)" ;;
    serve*) if ((best)); then echo "healthy until $(duration $(($(date +%s) - best))) ago"; else echo "never healthy"; fi ;;
    *) echo "at step $best" ;;
  esac
}

# Advice for spot slices that are preempted before anything is saved.
advice() {
  case $(cat "$state_dir/progress" 2>/dev/null || true) in
    shard*) echo "before a shard is finished, lower shard_size (and use another output)" ;;
    serve*) echo "before the weights are loaded, use LAUNCH_PROVISIONING=on-demand" ;;
    *) echo "before the run has saved, lower checkpoint.every" ;;
  esac
}

wait_before_start() {
  local seconds=$LAUNCH_BACKOFF_SECONDS i
  for ((i = 1; i < stalls; i++)); do seconds=$((seconds * 2)); done
  ((seconds <= LAUNCH_BACKOFF_MAX_SECONDS)) || seconds=$LAUNCH_BACKOFF_MAX_SECONDS
  log "waiting $(duration "$seconds") before the next start"
  sleep_unless_stopped "$seconds"
}

# Sleeps in polls of at least a second; stop.sh and down.sh end it after one.
sleep_unless_stopped() {
  local left=$1 poll=${LAUNCH_POLL_SECONDS%.*}
  ((poll > 0)) || poll=1
  for (( ; left > 0; left -= poll)); do
    exit_if_stopped
    sleep "$((left < poll ? left : poll))"
  done
}

start_run() {
  ((stalls < LAUNCH_MAX_STALLS)) ||
    finish 1 "gave up $(reached): $(plural "$stalls" "consecutive start") without progress. See $(verb_path logs) --lines 100; if a spot slice is preempted $(advice)"
  if [[ $pause ]] || ((stalls)); then wait_before_start; fi
  exit_if_stopped
  starts=$((starts + 1)) stalls=$((stalls + 1)) under_way=1 pause=''
  save_state
  log "start $starts: $(quoted "${command[@]}")"
  call_verb run -- "${command[@]}" || log "not started on all workers; checking what runs"
  stop_if_asked
}

# `stop` may have come before the run that it was to stop.
stop_if_asked() {
  local request LAUNCH_CALL_SECONDS=$((LAUNCH_CALL_SECONDS + LAUNCH_STOP_SECONDS))
  [[ -e $state_dir/stopped ]] || return 0
  read -r request _ <"$state_dir/stopped" || true
  [[ $request == down ]] || call_workers stop "$LAUNCH_STOP_SECONDS" ||
    log "a run may still be live: $(verb_path stop) ends it"
  exit_if_stopped
}

# Polls until something must be done, and sets `verdict`.
watch_run() {
  local bad_polls=0 bad_since=$SECONDS was_healthy=
  while true; do
    sleep "$LAUNCH_POLL_SECONDS"
    exit_if_stopped
    describe_slice
    case $slice_state in
      ACTIVE) ;;
      UNKNOWN) log "gcloud does not answer: $slice_message" && continue ;;
      *) verdict="lost the slice is $slice_state" && return ;;
    esac
    if call_workers status; then
      update_progress
      judge_reports
      judge_health
    else
      judge_missing_answers
    fi
    if [[ $verdict == running ]]; then bad_polls=0 && continue; fi
    ((++bad_polls > 1)) || bad_since=$SECONDS
    case $verdict in
      partial*) ((bad_polls < LAUNCH_BAD_POLLS)) || return 0 ;;
      silent*) if ((bad_polls >= LAUNCH_BAD_POLLS)); then verdict="lost ${verdict#* }" && return; fi ;;
      unreachable*) if ((bad_polls >= 10 * LAUNCH_BAD_POLLS)); then verdict="lost ${verdict#* }" && return; fi ;;
      leaving*) ((SECONDS - bad_since < LAUNCH_STOP_SECONDS)) || return 0 ;;
      *) return ;;
    esac
  done
}

# Judges a server whose processes run: once healthy, it has to stay so.
judge_health() {
  [[ $unit == serve && $verdict == running ]] || return 0
  if [[ $progress != - ]]; then
    was_healthy=1
  elif [[ $was_healthy ]]; then
    verdict="partial $(plural "$workers" worker) run, but the server does not answer at /health"
  fi
}

# Judges missing answers. If no worker answers although all nodes are ready, the connection may be
# broken rather than the slice, so the slice is deleted only after a long time.
judge_missing_answers() {
  local nodes
  nodes=$(list_nodes)
  if grep -qv ' READY ' <<<"$nodes"; then
    verdict="silent $(awk '$2 != "READY" { print "node", $1, "is", $2; exit }' <<<"$nodes")"
  elif ((${#reports[@]})); then
    verdict="silent ${#reports[@]} of $(plural "$workers" worker) answer"
  else
    verdict="unreachable no worker answers"
  fi
}

# Acts on the verdict; calls `finish` if the run is over.
act_on() {
  log "${verdict#* }"
  case $verdict in
    done*) finish 0 "done, $(reached)" ;;
    refused*) finish "$exit_code" "not restarted: something must be changed first, see $(verb_path logs)" ;;
    lost*) if [[ $slice_state == ACTIVE ]]; then delete_lost_slice; fi ;;
    partial* | leaving*)
      call_workers stop 0 || true
      pause=1
      ;;
    failed*) pause=1 ;;
    saved*) ;;
  esac
  under_way=''
  save_state
}

delete_lost_slice() {
  if delete_slice; then record_history end "$(date +%s)"; else log "the slice was not deleted; the reason is above"; fi
}

check_run() {
  check_command
  check_folder
  check_buckets
}

babysit() {
  local failures=0
  while true; do
    exit_if_stopped
    if ! prepare_slice; then
      exit_if_stopped
      ((++failures < LAUNCH_MAX_STALLS)) || finish 1 "gave up: preparing the slice failed $failures times in a row"
      sleep "$LAUNCH_POLL_SECONDS"
      continue
    fi
    failures=0
    [[ $under_way ]] || start_run
    watch_run
    act_on
  done
}

parse_common "$@"
((${#args[@]} == 0)) || refuse "put the command after --, for example: launch/babysit.sh -- grok train first.yaml folder=gs://my-bucket/runs/first"
load_settings
refuse_example_settings
export LAUNCH_BABYSITTER=$$ # `up` and `run` see that the babysitter calls them
if [[ $dry_run ]]; then
  ((${#command[@]})) || refuse "put the command after --, for example: launch/babysit.sh -- grok train first.yaml folder=gs://my-bucket/runs/first"
  check_run
  cost=$(price) || exit
  printf '# %s\n' "$cost"
  for step in up setup sync; do call_verb "$step"; done
  call_verb run -- "${command[@]}"
  exit
fi
make_state_dir
only_one_babysitter
trap 'rm -f "$state_dir/babysit.pid"' EXIT
# After stop.sh or down.sh, start from the beginning; the command may be another one.
[[ ! -e $state_dir/stopped ]] || rm -f "$state_dir/stopped" "$state_dir/babysit"
resolve_command
check_run
quoted "${command[@]}" >"$state_dir/command"
# A caller that names this file deletes the slice afterwards, but not for a start that was refused.
[[ ! ${LAUNCH_BEGUN:-} ]] || touch "$LAUNCH_BEGUN"
load_state
babysit
