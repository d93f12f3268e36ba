# shellcheck shell=bash
# Asking the workers: a verb of worker.sh on all of them at once. Sourced after provider.sh.
# shellcheck disable=SC2034,SC2154 # what it sets and reads belongs to the scripts that source it

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

# Sets step and loss from the newest line of metrics: from a worker's report, or from gs://.
newest_metrics() {
  local report folder line
  step=- loss=-
  folder=$(cat "$state_dir/folder" 2>/dev/null || true)
  if [[ $folder == gs://* ]]; then
    line=$(read_end_of "$folder/metrics.jsonl" | grep '"loss"' | tail -n 1 || true)
    if [[ $line =~ \"step\":\ ?([0-9]+) ]]; then step=${BASH_REMATCH[1]}; fi
    if [[ $line =~ \"loss\":\ ?([-+.0-9eE]+|NaN) ]]; then loss=${BASH_REMATCH[1]}; fi
    return
  fi
  for report in "${reports[@]}"; do
    [[ $(value_of step "$report") != - ]] || continue
    step=$(value_of step "$report") loss=$(value_of loss "$report")
  done
}
