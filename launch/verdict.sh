# shellcheck shell=bash
# What the workers' reports mean for a run: the contract of exit codes. Sourced by babysit.
# shellcheck disable=SC2034,SC2154 # what it sets and reads belongs to the script that sources it

# Sets `verdict` to a word and its reason, and exit_code, from the `reports` of all workers:
#   running   all run               leaving   some ended with 0 or 75, the others may be saving
#   done      all ended with 0      partial   some failed, the others may wait for them for ever
#   saved     75: asked to stop     refused   2 or 65: starting again would not help
#                                   failed    anything else: start again
judge_reports() {
  local report state code running=0 zero=0 saved=0 refused='' other=''
  for report in "${reports[@]}"; do
    state=$(value_of state "$report") code=$(value_of code "$report")
    case $state.$code in
      running.*) running=$((running + 1)) ;;
      exited.0) zero=$((zero + 1)) ;;
      exited.75) saved=$((saved + 1)) ;;
      exited.2 | exited.65) refused=${report%% *} exit_code=$code ;;
      exited.*) other="${report%% *} ended with exit code $code" ;;
      lost.*) other="${report%% *} lost the run without an exit code" ;;
      *) other="${report%% *} has no run" ;;
    esac
  done
  if [[ $refused ]]; then
    verdict="refused $refused ended with exit code $exit_code"
  elif ((running == workers)); then
    verdict=running
  elif ((running)) && [[ $other ]]; then
    verdict="partial $running of $(counted "$workers" worker) run, but $other"
  elif ((running)); then
    verdict="leaving $running of $(counted "$workers" worker) run, the others have saved and left"
  elif ((zero == workers)); then
    verdict="done exit code 0 of $(counted "$workers" worker)"
  elif [[ $other ]]; then
    verdict="failed $other"
  else
    verdict="saved $saved of $(counted "$workers" worker) saved, being asked to stop"
  fi
}
