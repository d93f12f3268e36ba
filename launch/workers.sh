# shellcheck shell=bash
# Calls verbs of worker.sh on all workers at once. Sourced after provider.sh.
# shellcheck disable=SC2034,SC2154 # its variables belong to the scripts that source it
source "$launch_dir/progress.sh"

# Runs a verb of worker.sh with plain words on all workers. Shows their lines as they arrive, and sets
# `reports` to their final reports, `WORKER KEY=VALUE ...`. True if all answered.
call_workers() {
  local line errors
  reports=()
  ssh_command bash grok-launch/worker.sh "$@"
  if [[ $dry_run ]]; then quoted "${gcloud[@]}" && return; fi
  errors=$(mktemp)
  while IFS= read -r line; do
    if [[ $line =~ ^\[([^]]+)\]\ @\ (.*)$ ]]; then
      reports+=("${BASH_REMATCH[1]} ${BASH_REMATCH[2]}")
    else
      printf '%s\n' "$line"
    fi
  done < <(limited "${gcloud[@]}" 2>"$errors" </dev/null)
  if ((${#reports[@]} < workers)); then
    warn "${#reports[@]} of $(plural "$workers" worker) answered"
    filter_errors <"$errors"
  fi
  rm -f "$errors"
  ((${#reports[@]} == workers))
}

# Fails with the reason why workers were not reached: the state of the slice, or else the message.
fail_unreached() {
  describe_slice
  case $slice_state in
    ABSENT) exit 1 ;; # filter_errors named the verb that creates it
    ACTIVE | UNKNOWN) fail "$1" ;;
    *) fail "$LAUNCH_NAME is $slice_state: $(verb_path up) waits until it is ready, $(verb_path down) deletes it" ;;
  esac
}

# The same as call_workers, and fails unless every worker succeeded.
call_all_workers() {
  local report bad=0
  call_workers "$@" || bad=1
  for report in "${reports[@]}"; do
    [[ $report == *' failed='* ]] || continue
    warn "${report%% *}: ${report#* failed=}"
    bad=1
  done
  ((bad == 0)) || fail_unreached "'$1' did not succeed on all workers; retry the same command"
}

# value_of KEY REPORT: prints the value of a key in a report, or -.
value_of() {
  if [[ " $2 " =~ \ $1=([^ ]*)\  ]]; then echo "${BASH_REMATCH[1]}"; else echo -; fi
}

# Sets unit (step, shard or serve), progress, total, loss and slow (the host that is slow for long) of the run: from
# gs://, or from the worker that has come farthest.
read_progress() {
  local report folder at
  unit=step progress=- total=- loss=- slow=-
  [[ -f $state_dir/progress ]] || return 0
  read -r unit folder <"$state_dir/progress"
  if [[ $folder == gs://* && $unit == shard ]]; then
    read_shards "$(list_files "$folder/answers/*.jsonl")" "$(read_tail "$folder/job.json")"
  elif [[ $folder == gs://* ]]; then
    read_metrics "$(read_tail "$folder/metrics.jsonl")"
  else
    for report in "${reports[@]}"; do
      at=$(value_of progress "$report")
      if [[ $at == - ]] || ((at <= ${progress/-/-1})); then continue; fi
      progress=$at total=$(value_of total "$report") loss=$(value_of loss "$report")
      slow=$(value_of slow "$report")
    done
  fi
}
