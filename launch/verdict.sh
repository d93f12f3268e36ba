# shellcheck shell=bash
# Interprets the workers' reports by the exit codes of a run. Sourced by babysit.
# shellcheck disable=SC2034,SC2154 # what it sets and reads belongs to the script that sources it

# Sets `verdict` to a word and its reason, and exit_code, from the `reports` of all workers:
#   running   all run               leaving   some exited with 0 or 75, the others may be saving
#   done      all exited with 0     partial   some failed, the others may wait for them forever
#   saved     75: asked to stop     refused   2 or 65: a restart would not help
#                                   failed    anything else: restart
judge_reports() {
  local report state code running=0 zero=0 saved=0 refused='' other=''
  for report in "${reports[@]}"; do
    state=$(value_of state "$report") code=$(value_of code "$report")
    case $state.$code in
      running.*) running=$((running + 1)) ;;
      exited.0) zero=$((zero + 1)) ;;
      exited.75) saved=$((saved + 1)) ;;
      exited.2 | exited.65) refused=${report%% *} exit_code=$code ;;
      exited.*) other="${report%% *} exited with code $code" ;;
      lost.*) other="${report%% *} lost its run without an exit code" ;;
      *) other="${report%% *} has no run" ;;
    esac
  done
  if [[ $refused ]]; then
    verdict="refused $refused exited with code $exit_code"
  elif ((running == workers)); then
    verdict=running
  elif ((running)) && [[ $other ]]; then
    verdict="partial $running of $(plural "$workers" worker) run, but $other"
  elif ((running)); then
    verdict="leaving $running of $(plural "$workers" worker) still run, the others have saved and exited"
  elif ((zero == workers)); then
    verdict="done exit code 0 of $(plural "$workers" worker)"
  elif [[ $other ]]; then
    verdict="failed $other"
  else
    verdict="saved $saved of $(plural "$workers" worker) saved and stopped as asked"
  fi
}
