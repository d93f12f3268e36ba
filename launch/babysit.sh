#!/usr/bin/env bash
# Usage: launch/babysit.sh -- COMMAND [ARGUMENT]...
#        launch/babysit.sh
#
# Keeps a run going until it is done: makes the slice, sets it up, brings the code, starts the
# command, and looks at it every LAUNCH_POLL_SECONDS. A slice that was taken away is made again; a
# run that ended is started again as its exit code says:
#
#   0       done: babysit ends with 0
#   2, 65   something must be changed first (config or data; numbers): babysit ends with that code
#   75      saved and asked to stop: started again, unless launch/stop.sh or down.sh asked (then 75)
#   other   started again after a wait that doubles
#
# It gives up, with 1, after LAUNCH_MAX_STALLS starts in a row that brought no new step (of a batch: no
# new shard of answers), which it reads where folder= or output= of the command says. Killed and called
# again, without the command or with the same, it goes on where it was: run it in tmux, or under
# anything that restarts it. Restarts use the code of the first start, not today's tree.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$launch_dir/provider.sh"
source "$launch_dir/workers.sh"
source "$launch_dir/verdict.sh"

# What it remembers, in $state_dir/babysit: which slice is set up, starts so far, starts without
# progress, the newest step or the number of shards, and whether a run is under way.
remember() {
  printf 'prepared=%q\nstarts=%q\nstalls=%q\nbest=%q\nunder_way=%q\n' \
    "$prepared" "$starts" "$stalls" "$best" "$under_way" >"$state_dir/babysit.new"
  mv "$state_dir/babysit.new" "$state_dir/babysit"
}

recall() {
  prepared='' starts=0 stalls=0 best=0 under_way='' pause=''
  # shellcheck source=/dev/null
  [[ ! -f $state_dir/babysit ]] || source "$state_dir/babysit"
}

take_command() {
  local before
  before=$(cat "$state_dir/command" 2>/dev/null || true)
  if ((${#command[@]} == 0)); then
    [[ $before ]] || refuse "what to run comes after --, as in: launch/babysit.sh -- grok train grok-1b"
    eval "command=($before)" # written by `quoted`, below
  elif [[ $(quoted "${command[@]}") != "$before" ]]; then
    [[ ! -f $state_dir/babysit ]] ||
      refuse "$LAUNCH_NAME is at another command ($before): call it as before, or $(typed stop) first"
    quoted "${command[@]}" >"$state_dir/command"
  fi
}

only_one_babysitter() {
  local other
  other=$(cat "$state_dir/babysit.pid" 2>/dev/null || true)
  # After a restart of this machine the number may be another process's.
  [[ -z $other || $(ps -ww -o args= -p "$other") != *babysit.sh* ]] ||
    refuse "process $other on this machine babysits $LAUNCH_NAME already"
  echo $$ >"$state_dir/babysit.pid"
}

# Ends; the next babysit begins anew.
finish() {
  rm -f "$state_dir/babysit" "$state_dir/babysit.pid" "$state_dir/command"
  say "${*:2}"
  exit "$1"
}

# What stop.sh and down.sh leave.
end_if_asked() {
  [[ ! -e $state_dir/stopped ]] || finish 75 "asked to stop, $(reached)"
}

# One try of each verb that a fresh slice needs; true when the slice is ready for a run.
prepare_slice() {
  local now
  call_verb up || return 1
  now=$(look_at_nodes | awk '{ print $1, $5 }' | tr '\n' ' ')
  [[ $now != *'  '* ]] || return 1 # a node that did not say when it was made
  [[ $now != "$prepared" ]] || return 0
  call_verb setup || return 1
  if ((starts == 0)); then call_verb sync || return 1; else call_verb sync --again || return 1; fi
  prepared=$now under_way=''
  remember
}

# A start counts as stalled until a new step or shard is seen.
note_progress() {
  look_at_progress
  [[ $progress != - ]] && ((progress > best)) || return 0
  best=$progress stalls=0
  remember
}

reached() {
  case $(cat "$state_dir/progress" 2>/dev/null || true) in
    shard*) echo "with $(counted "$best" shard)" ;;
    *) echo "at step $best" ;;
  esac
}

# What to do where spot slices go sooner than anything is saved.
advice() {
  case $(cat "$state_dir/progress" 2>/dev/null || true) in
    shard*) echo "before a shard is whole, lower shard_size (and take another output)" ;;
    *) echo "before the run has saved, lower checkpoint.every" ;;
  esac
}

wait_before_start() {
  local seconds=$LAUNCH_BACKOFF_SECONDS i
  for ((i = 1; i < stalls; i++)); do seconds=$((seconds * 2)); done
  ((seconds <= LAUNCH_BACKOFF_MAX_SECONDS)) || seconds=$LAUNCH_BACKOFF_MAX_SECONDS
  say "waiting $(duration "$seconds") before the next start"
  sleep "$seconds"
}

start_run() {
  ((stalls < LAUNCH_MAX_STALLS)) ||
    finish 1 "gave up $(reached): $(counted "$stalls" start) in a row brought nothing new. See $(typed logs) --lines 100; where a spot slice is taken away $(advice)"
  if [[ $pause ]] || ((stalls)); then wait_before_start; fi
  end_if_asked
  starts=$((starts + 1)) stalls=$((stalls + 1)) under_way=1 pause=''
  remember
  say "start $starts: $(quoted "${command[@]}")"
  call_verb run -- "${command[@]}" || say "not started everywhere; looking at what there is"
}

# Looks until there is something to do about it, and sets `verdict`.
watch_run() {
  local odd=0 since_odd=$SECONDS
  while true; do
    sleep "$LAUNCH_POLL_SECONDS"
    end_if_asked
    look_at_slice
    case $slice_state in
      ACTIVE) ;;
      UNKNOWN) say "gcloud does not answer: $slice_message" && continue ;;
      *) verdict="lost the slice is $slice_state" && return ;;
    esac
    if ask_workers status; then
      note_progress
      judge_reports
    else
      judge_silence
    fi
    if [[ $verdict == running ]]; then odd=0 && continue; fi
    ((++odd > 1)) || since_odd=$SECONDS
    case $verdict in
      partial*) ((odd < LAUNCH_BAD_POLLS)) || return 0 ;;
      silent*) if ((odd >= LAUNCH_BAD_POLLS)); then verdict="lost ${verdict#* }" && return; fi ;;
      unreachable*) if ((odd >= 10 * LAUNCH_BAD_POLLS)); then verdict="lost ${verdict#* }" && return; fi ;;
      leaving*) ((SECONDS - since_odd < LAUNCH_STOP_SECONDS)) || return 0 ;;
      *) return ;;
    esac
  done
}

# Not all workers answered. Where none does and all nodes are ready, the way there may be what is
# broken: that alone is a reason to delete a slice only after a long while.
judge_silence() {
  local nodes
  nodes=$(look_at_nodes)
  if grep -qv ' READY ' <<<"$nodes"; then
    verdict="silent $(awk '$2 != "READY" { print "node", $1, "is", $2; exit }' <<<"$nodes")"
  elif ((${#reports[@]})); then
    verdict="silent ${#reports[@]} of $(counted "$workers" worker) answer"
  else
    verdict="unreachable no worker answers"
  fi
}

# What a verdict asks for; `finish` where that is the end.
act_on() {
  say "${verdict#* }"
  case $verdict in
    done*) finish 0 "done, $(reached)" ;;
    refused*) finish "$exit_code" "not started again: something must be changed first, see $(typed logs)" ;;
    lost*) if [[ $slice_state == ACTIVE ]]; then delete_lost_slice; fi ;;
    partial* | leaving*)
      ask_workers stop 0 || true
      pause=1
      ;;
    failed*) pause=1 ;;
    saved*) ;;
  esac
  under_way=''
  remember
}

delete_lost_slice() {
  note_history end "$(date +%s)"
  delete_slice || say "the slice was not deleted; trying again"
}

babysit() {
  local failures=0
  while true; do
    end_if_asked
    if ! prepare_slice; then
      ((++failures < LAUNCH_MAX_STALLS)) || finish 1 "gave up: the slice could not be made ready $failures times in a row"
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
((${#args[@]} == 0)) || refuse "what to run comes after --, as in: launch/babysit.sh -- grok train grok-1b"
load_settings
if [[ $dry_run ]]; then
  ((${#command[@]})) || refuse "what to run comes after --, as in: launch/babysit.sh -- grok train grok-1b"
  for step in up setup sync; do call_verb "$step"; done
  call_verb run -- "${command[@]}"
  exit
fi
make_state_dir
only_one_babysitter
trap 'rm -f "$state_dir/babysit.pid"' EXIT
# After stop.sh and down.sh a new beginning is meant, and another command may be.
[[ ! -e $state_dir/stopped ]] || rm -f "$state_dir/stopped" "$state_dir/babysit"
take_command
recall
babysit
