# shellcheck shell=bash
# All cloud calls, through gcloud: queued resources of the Cloud TPU API, and gs://.
# A second provider would be a file with the same functions. Sourced after common.sh, never run.
# shellcheck disable=SC2034,SC2154 # its variables belong to the scripts that source it

# Sets `gcloud` to a command on this slice.
tpu_command() {
  gcloud=(gcloud compute tpus "$@" --zone="$LAUNCH_ZONE" --project="$LAUNCH_PROJECT" --quiet)
}

node_names() {
  local i
  if ((LAUNCH_NODE_COUNT == 1)); then
    echo "$LAUNCH_NAME"
  else
    for ((i = 0; i < LAUNCH_NODE_COUNT; i++)); do echo "$LAUNCH_NAME-$i"; done
  fi
}

# Sets slice_state, slice_accelerator and slice_message. The state is ABSENT if the slice does not
# exist, and UNKNOWN, with gcloud's error as the message, if gcloud does not answer.
describe_slice() {
  local errors answer format
  format='value[separator="|"](state.state,tpu.nodeSpec[0].node.acceleratorType,state.failedData.error.message)'
  slice_state=ABSENT slice_accelerator='' slice_message=''
  tpu_command queued-resources describe "$LAUNCH_NAME" --format="$format"
  if [[ $dry_run ]]; then quoted "${gcloud[@]}" && return; fi
  errors=$(mktemp)
  if answer=$(limited "${gcloud[@]}" 2>"$errors"); then
    IFS='|' read -r slice_state slice_accelerator slice_message <<<"$answer"
  elif ! grep -q NOT_FOUND "$errors"; then
    # The first line of a long error says what it is.
    slice_state=UNKNOWN slice_message=$(sed -n 's/^ERROR: ([^)]*) //p' "$errors" | head -n 1)
    : "${slice_message:=$(tail -n 1 "$errors")}"
    ! grep -q 'gcloud auth login' "$errors" || slice_message+=' (gcloud auth login)'
  fi
  rm -f "$errors"
}

# Prints `NAME STATE HEALTH HOSTS EPOCH` for each node; EPOCH is its creation time.
list_nodes() {
  local node answer state health endpoints created format
  format='value[separator="|"](state,health,networkEndpoints.len(),createTime.date("%s"))'
  for node in $(node_names); do
    tpu_command tpu-vm describe "$node" --format="$format"
    if [[ $dry_run ]]; then quoted "${gcloud[@]}" && continue; fi
    answer=$(limited "${gcloud[@]}" 2>/dev/null) || answer='UNKNOWN|||'
    IFS='|' read -r state health endpoints created <<<"$answer"
    echo "$node ${state:-UNKNOWN} ${health:-UNKNOWN} ${endpoints:-0} ${created%%.*}"
  done
}

create_slice() {
  local -a options=(--accelerator-type="$LAUNCH_ACCELERATOR" --runtime-version="$LAUNCH_RUNTIME")
  if ((LAUNCH_NODE_COUNT == 1)); then
    options+=(--node-id="$LAUNCH_NAME")
  else
    options+=(--node-count="$LAUNCH_NODE_COUNT" --node-prefix="$LAUNCH_NAME")
  fi
  [[ $LAUNCH_PROVISIONING == on-demand ]] || options+=("--$LAUNCH_PROVISIONING")
  [[ $LAUNCH_INTERNAL_IPS == no ]] || options+=(--internal-ips)
  [[ -z $LAUNCH_NETWORK ]] || options+=(--network="$LAUNCH_NETWORK")
  [[ -z $LAUNCH_SUBNETWORK ]] || options+=(--subnetwork="$LAUNCH_SUBNETWORK")
  [[ -z $LAUNCH_SERVICE_ACCOUNT ]] || options+=(--service-account="$LAUNCH_SERVICE_ACCOUNT"
    --scopes=https://www.googleapis.com/auth/cloud-platform)
  [[ -z $LAUNCH_LABELS ]] || options+=(--labels="$LAUNCH_LABELS")
  [[ -z $LAUNCH_VALID_UNTIL ]] || options+=(--valid-until-duration="$LAUNCH_VALID_UNTIL")
  tpu_command queued-resources create "$LAUNCH_NAME" "${options[@]}" --async
  run "${gcloud[@]}"
}

# Deletes the slice; returns when its name is free.
delete_slice() {
  tpu_command queued-resources delete "$LAUNCH_NAME" --force
  run "${gcloud[@]}"
}

# set_worker_options [OPTION]...: sets `worker_options` to the options that reach these workers; default:
# all at once. Without --batch-size=all, a failure in one batch would keep the next batch from starting.
set_worker_options() {
  worker_options=("$@")
  (($#)) || worker_options=(--node=all --worker=all --batch-size=all)
  if [[ $LAUNCH_IAP == yes ]]; then
    worker_options+=(--tunnel-through-iap)
  elif [[ $LAUNCH_INTERNAL_IPS == yes ]]; then
    worker_options+=(--internal-ip)
  fi
}

# Sets `gcloud` to a command that runs words on all workers. gcloud splits them on spaces. It skips a
# node that it cannot prepare and still exits with 0, so callers must count the answers.
ssh_command() {
  set_worker_options
  tpu_command queued-resources ssh "$LAUNCH_NAME" "${worker_options[@]}" --command="$*"
}

# tunnel_command PORT HOST:PORT: sets `gcloud` to a command that forwards a port of this machine to an
# address as the first worker sees it, until it is killed or the connection is lost.
tunnel_command() {
  set_worker_options --node=0 --worker=0
  tpu_command queued-resources ssh "$LAUNCH_NAME" "${worker_options[@]}"
  gcloud+=(-- -N -L "127.0.0.1:$1:$2" -o ExitOnForwardFailure=yes -o ServerAliveInterval=15)
}

# Shows gcloud's errors on the way to workers, without its routine messages.
filter_errors() {
  sed -e '/^S[CS][PH]: Attempting to connect/d' -e '/^Using s[cs][ph] batch size/d' \
    -e "s|^.*NOT_FOUND.*|there is no slice $LAUNCH_NAME in $LAUNCH_ZONE: $(verb_path up) creates it|" \
    -e "s|^bash: .*worker.sh: No such file.*|a worker is not set up: run $(verb_path setup)|" >&2
}

# copy_to_workers FOLDER FILE...: copies files into a folder on every worker.
copy_to_workers() {
  set_worker_options
  tpu_command queued-resources scp "${@:2}" "$LAUNCH_NAME:$1" "${worker_options[@]}"
  run "${gcloud[@]}" 2> >(filter_errors)
}

# Prints the last 64 KiB of a file at gs://, or nothing if it does not exist yet.
read_tail() {
  local -a cat=(gcloud storage cat --range=-65536 "$1" --project="$LAUNCH_PROJECT")
  if [[ $dry_run ]]; then quoted "${cat[@]}" && return; fi
  limited "${cat[@]}" 2>/dev/null || true
}

# Prints the matching names at gs://, or nothing.
list_files() {
  limited gcloud storage ls "$1" --project="$LAUNCH_PROJECT" 2>/dev/null || true
}

# Queries of doctor: true if there is an answer; sets `answer`, and ask_error to what gcloud said instead.
ask() {
  local errors code=0
  answer='' ask_error=''
  if [[ $dry_run ]]; then quoted "$@" && return 1; fi
  errors=$(mktemp)
  answer=$(limited "$@" 2>"$errors" </dev/null) || code=1
  ask_error=$(<"$errors")
  rm -f "$errors"
  [[ $code == 0 && $answer ]]
}

ask_queued_resources() { ask gcloud help compute tpus queued-resources ssh; }
ask_account() { ask gcloud auth list --filter=status:ACTIVE --format='value(account)'; }
ask_project() { ask gcloud projects describe "$LAUNCH_PROJECT" --format='value(lifecycleState)'; }
ask_api() {
  ask gcloud services list --enabled --filter=config.name=tpu.googleapis.com \
    --format='value(config.name)' --project="$LAUNCH_PROJECT"
}
ask_accelerator() {
  ask gcloud compute tpus tpu-vm accelerator-types list --filter="type=$LAUNCH_ACCELERATOR" \
    --format='value(type)' --zone="$LAUNCH_ZONE" --project="$LAUNCH_PROJECT"
}
ask_runtime() {
  ask gcloud compute tpus tpu-vm versions list --filter="version=$LAUNCH_RUNTIME" \
    --format='value(version)' --zone="$LAUNCH_ZONE" --project="$LAUNCH_PROJECT"
}
ask_file() { ask gcloud storage ls "$1" --project="$LAUNCH_PROJECT"; }
ask_bucket() { ask gcloud storage buckets describe "$1" --format='value(location)'; }

# False, too, for a bucket that this account may use and not describe, and where gcloud does not answer.
bucket_is_missing() { ! ask_bucket "$1" && [[ $ask_error =~ (HTTPError|not found:)\ 404 ]]; }
