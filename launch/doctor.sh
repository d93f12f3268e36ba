#!/usr/bin/env bash
# Usage: launch/doctor.sh [-- COMMAND [ARGUMENT]...]
#
# Checks what the other verbs need and says how to fix what is missing: programs, login, project, settings,
# zone, ssh key, bucket, prices. Names the quota that the slice needs, which it cannot check. With a command,
# as worked runs give theirs, also names its inputs at gs:// that are not there yet. Changes nothing. Exits
# with 0 if nothing is to be fixed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$launch_dir/provider.sh"
source "$launch_dir/preflight.sh"

findings=0
good() { [[ $dry_run ]] || printf 'ok   %s\n' "$*"; }
finding() {
  [[ $dry_run ]] && return
  findings=$((findings + 1))
  printf 'FIX  %s\n       %s\n' "$1" "$2"
}

check_programs() {
  local program
  for program in git tar awk ssh; do
    type -P "$program" >/dev/null || finding "$program is not installed" "install it with the system's package manager"
  done
  git -C "$root" rev-parse --quiet --verify HEAD >/dev/null 2>&1 ||
    finding "$root is not a git repository" "clone it with git: sync sends a commit"
  type -P timeout >/dev/null || type -P gtimeout >/dev/null ||
    finding "timeout is not installed" "on a Mac: brew install coreutils"
  good "bash $BASH_VERSION"
}

# Settings that nobody edited, and what a slice of the others costs.
check_settings_file() {
  local name cost
  for name in $(example_settings); do
    finding "$name is ${!name}, as in the example" "edit $settings"
  done
  if cost=$(price); then
    [[ $dry_run ]] || printf 'note %s\n' "$cost"
  else
    finding "the slice's price is not known" "name a file with it in LAUNCH_PRICES of $settings"
  fi
  if [[ -x $root/.venv/bin/grok ]] || type -P grok >/dev/null; then
    good "grok is installed here: run and babysit check a command's config before anything is created"
  else
    finding "grok is not installed here, so that no command's config can be checked" "make env in $root"
  fi
}

check_gcloud() {
  if [[ ! $dry_run ]] && ! type -P gcloud >/dev/null; then
    finding "gcloud is not installed" "install it: https://cloud.google.com/sdk/docs/install"
    return 1
  fi
  if ask_queued_resources; then
    good "gcloud has queued resources"
  else
    finding "gcloud is too old and has no queued resources" "gcloud components update"
  fi
  if ask_account; then
    good "logged in as $answer"
  else
    finding "no account is logged in" "gcloud auth login, then run doctor again: the cloud was not queried"
    [[ $dry_run ]]
  fi
}

check_project() {
  if ask_project; then
    good "project $LAUNCH_PROJECT is $answer"
  else
    finding "project $LAUNCH_PROJECT is not visible" "correct LAUNCH_PROJECT, or ask the project's owner for roles/tpu.admin"
  fi
  if ask_api; then
    good "the TPU API is enabled"
  else
    finding "the TPU API is not enabled" "gcloud services enable tpu.googleapis.com --project=$LAUNCH_PROJECT"
  fi
}

check_zone() {
  if ask_accelerator; then
    good "$LAUNCH_ZONE has $LAUNCH_ACCELERATOR"
  else
    finding "$LAUNCH_ZONE does not offer $LAUNCH_ACCELERATOR" \
      "choose another LAUNCH_ZONE: https://cloud.google.com/tpu/docs/regions-zones"
  fi
  if ask_runtime; then
    good "it has runtime $LAUNCH_RUNTIME"
  else
    finding "$LAUNCH_ZONE does not offer runtime $LAUNCH_RUNTIME" \
      "gcloud compute tpus tpu-vm versions list --zone=$LAUNCH_ZONE --project=$LAUNCH_PROJECT lists those it has"
  fi
}

# With several workers gcloud needs its key in the agent: without it ssh would hang.
check_ssh_key() {
  local key=$HOME/.ssh/google_compute_engine fingerprint
  if [[ ! -f $key ]]; then
    finding "gcloud has not created an ssh key yet" "gcloud compute config-ssh --project=$LAUNCH_PROJECT, then ssh-add $key"
    return
  fi
  fingerprint=$(ssh-keygen -lf "$key" 2>/dev/null | cut -d ' ' -f 2 || true)
  if ssh-add -l 2>/dev/null | grep -qF -- "${fingerprint:-none}"; then
    good "the ssh key is in the agent"
  elif ((workers == 1)); then
    good "the ssh key exists (one worker needs no agent)"
  else
    finding "the ssh key is not in the agent" "eval \"\$(ssh-agent)\" && ssh-add $key"
  fi
}

check_bucket() {
  if [[ -z $LAUNCH_BUCKET ]]; then
    finding "LAUNCH_BUCKET is not set" "checkpoints on a worker's disk are deleted with the slice: $(bucket_creation gs://NAME)"
  elif ! ask_bucket "$LAUNCH_BUCKET"; then
    finding "bucket $LAUNCH_BUCKET is not visible" "$(bucket_creation "$LAUNCH_BUCKET")"
  elif [[ ${answer,,} != "${LAUNCH_ZONE%-*}" ]]; then
    finding "bucket $LAUNCH_BUCKET is in ${answer,,}, the zone is in ${LAUNCH_ZONE%-*}" \
      "reads across regions are slow and are charged; use a bucket in ${LAUNCH_ZONE%-*}"
  else
    good "bucket $LAUNCH_BUCKET is in the zone's region"
  fi
}

# Inputs may come later than the settings, and so are no finding.
check_inputs() {
  local word input
  for word in "${command[@]}"; do
    [[ $word =~ ^(data\.[a-z_]+|train\.init_from|weights|tokenizer|input)= ]] || continue
    while read -r input; do
      ask_file "$input" || [[ $dry_run ]] ||
        printf 'note %s\n       %s\n' "$input is not there yet" "launch/README.md, 3 and 4: data and weights into the bucket"
    done < <(grep -oE 'gs://[^], }]+' <<<"$word")
  done
}

# Prints hints on what cannot be checked in general.
hints() {
  [[ $dry_run ]] && return
  local kind=on-demand amount=$((chips * LAUNCH_NODE_COUNT)) unit=chips
  [[ $LAUNCH_PROVISIONING != spot ]] || kind=preemptible
  if [[ $generation == v4 || $generation == v5p ]]; then amount=$((amount * 2)) unit=cores; fi
  printf 'note %s\n       %s\n' \
    "this needs a quota of $amount $kind $generation $unit in $LAUNCH_ZONE, which is not checked here" \
    "gcloud alpha services quota list --service=tpu.googleapis.com --consumer=projects/$LAUNCH_PROJECT"
  [[ $LAUNCH_INTERNAL_IPS == no ]] ||
    printf 'note %s\n' "workers without external addresses need Cloud NAT to install packages"
}

check_environment() {
  local name
  for name in $LAUNCH_ENV; do
    if [[ -n ${!name+set} ]]; then good "$name is set and will be sent"; else
      finding "LAUNCH_ENV names $name, which is not set here" "export it, or remove it from LAUNCH_ENV"
    fi
  done
}

parse_common "$@"
((${#args[@]} == 0)) || refuse "unknown argument '${args[0]}'; see $verb.sh --help"
load_settings
good "settings in $settings"
check_settings_file
check_programs
check_environment
if check_gcloud; then
  check_project
  check_zone
  check_bucket
  check_inputs
fi
check_ssh_key
hints
((findings == 0)) || fail "$findings to fix"
log "nothing to fix"
