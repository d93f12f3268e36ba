# shellcheck shell=bash
# Asking the workers: a verb of worker.sh on all of them at once. Sourced after provider.sh.
# shellcheck disable=SC2034,SC2154 # what it sets and reads belongs to the scripts that source it
source "$launch_dir/progress.sh"

# Runs a verb of worker.sh with plain words on all workers. Shows their lines as they come, and keeps
# what each reports at its end in `reports`: lines `WORKER KEY=VALUE ...`. True when all answered.
ask_workers() {
  local line errors
  reports=()
  on_workers bash grok-launch/worker.sh "$@"
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
    complain "${#reports[@]} of $(counted "$workers" worker) answered"
    tell_errors <"$errors"
  fi
  rm -f "$errors"
  ((${#reports[@]} == workers))
}

# The same, and every worker must have done it.
all_workers() {
  local report bad=0
  ask_workers "$@" || bad=1
  for report in "${reports[@]}"; do
    [[ $report == *' failed='* ]] || continue
    complain "${report%% *}: ${report#* failed=}"
    bad=1
  done
  ((bad == 0)) || fail "'$1' was not done on all workers; the same command may be repeated"
}

# The value of a key in a report.
value_of() {
  if [[ " $2 " =~ \ $1=([^ ]*)\  ]]; then echo "${BASH_REMATCH[1]}"; else echo -; fi
}

# Sets unit (step or shard), progress, total and loss of the run: from gs://, or what the worker that
# is farthest reports.
look_at_progress() {
  local report folder at
  unit=step progress=- total=- loss=-
  [[ -f $state_dir/progress ]] || return 0
  read -r unit folder <"$state_dir/progress"
  if [[ $folder == gs://* && $unit == shard ]]; then
    read_answers "$(list_files "$folder/answers/*.jsonl")" "$(read_end_of "$folder/job.json")"
  elif [[ $folder == gs://* ]]; then
    read_metrics "$(read_end_of "$folder/metrics.jsonl")"
  else
    for report in "${reports[@]}"; do
      at=$(value_of progress "$report")
      if [[ $at == - ]] || ((at <= ${progress/-/-1})); then continue; fi
      progress=$at total=$(value_of total "$report") loss=$(value_of loss "$report")
    done
  fi
}
