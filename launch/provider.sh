# shellcheck shell=bash
# Everything that calls the cloud: queued resources of the Cloud TPU API, and gs://, by gcloud.
# A second provider would be a file with these functions. Sourced after common.sh, never run.
# shellcheck disable=SC2034,SC2154 # what it sets and reads belongs to the scripts that source it

# Sets `gcloud` to a command about this slice.
about_slice() {
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

# Sets slice_state, slice_accelerator and slice_message. The state is ABSENT where there is no such
# slice, and UNKNOWN, with what gcloud said as message, where there was no answer.
look_at_slice() {
  local errors answer format
  format='value[separator="|"](state.state,tpu.nodeSpec[0].node.acceleratorType,state.failedData.error.message)'
  slice_state=ABSENT slice_accelerator='' slice_message=''
  about_slice queued-resources describe "$LAUNCH_NAME" --format="$format"
  if [[ $dry_run ]]; then quoted "${gcloud[@]}" && return; fi
  errors=$(mktemp)
  if answer=$(limited "${gcloud[@]}" 2>"$errors"); then
    IFS='|' read -r slice_state slice_accelerator slice_message <<<"$answer"
  elif ! grep -q NOT_FOUND "$errors"; then
    # Of an error of many lines the first says what it is.
    slice_state=UNKNOWN slice_message=$(sed -n 's/^ERROR: ([^)]*) //p' "$errors" | head -n 1)
    : "${slice_message:=$(tail -n 1 "$errors")}"
    ! grep -q 'gcloud auth login' "$errors" || slice_message+=' (gcloud auth login)'
  fi
  rm -f "$errors"
}

# Prints `NAME STATE HEALTH HOSTS EPOCH` for each node, the last being when it was created.
look_at_nodes() {
  local node answer state health endpoints created format
  format='value[separator="|"](state,health,networkEndpoints.len(),createTime.date("%s"))'
  for node in $(node_names); do
    about_slice tpu-vm describe "$node" --format="$format"
    if [[ $dry_run ]]; then quoted "${gcloud[@]}" && continue; fi
    answer=$(limited "${gcloud[@]}" 2>/dev/null) || answer='UNKNOWN|||'
    IFS='|' read -r state health endpoints created <<<"$answer"
    echo "$node ${state:-UNKNOWN} ${health:-UNKNOWN} ${endpoints:-0} ${created%%.*}"
  done
}

create_slice() {
  local -a wanted=(--accelerator-type="$LAUNCH_ACCELERATOR" --runtime-version="$LAUNCH_RUNTIME")
  if ((LAUNCH_NODE_COUNT == 1)); then
    wanted+=(--node-id="$LAUNCH_NAME")
  else
    wanted+=(--node-count="$LAUNCH_NODE_COUNT" --node-prefix="$LAUNCH_NAME")
  fi
  [[ $LAUNCH_PROVISIONING == on-demand ]] || wanted+=("--$LAUNCH_PROVISIONING")
  [[ $LAUNCH_INTERNAL_IPS == no ]] || wanted+=(--internal-ips)
  [[ -z $LAUNCH_NETWORK ]] || wanted+=(--network="$LAUNCH_NETWORK")
  [[ -z $LAUNCH_SUBNETWORK ]] || wanted+=(--subnetwork="$LAUNCH_SUBNETWORK")
  [[ -z $LAUNCH_SERVICE_ACCOUNT ]] || wanted+=(--service-account="$LAUNCH_SERVICE_ACCOUNT"
    --scopes=https://www.googleapis.com/auth/cloud-platform)
  [[ -z $LAUNCH_LABELS ]] || wanted+=(--labels="$LAUNCH_LABELS")
  [[ -z $LAUNCH_VALID_UNTIL ]] || wanted+=(--valid-until-duration="$LAUNCH_VALID_UNTIL")
  about_slice queued-resources create "$LAUNCH_NAME" "${wanted[@]}" --async
  run "${gcloud[@]}"
}

# Returns when the slice is gone and its name is free.
delete_slice() {
  about_slice queued-resources delete "$LAUNCH_NAME" --force
  run "${gcloud[@]}"
}

# Sets `everywhere` to the options that reach all workers at once. Without --batch-size=all a batch
# with a failure in it would keep the next from starting.
reach_everywhere() {
  everywhere=(--node=all --worker=all --batch-size=all)
  if [[ $LAUNCH_IAP == yes ]]; then
    everywhere+=(--tunnel-through-iap)
  elif [[ $LAUNCH_INTERNAL_IPS == yes ]]; then
    everywhere+=(--internal-ip)
  fi
}

# Sets `gcloud` to a command that runs words on all workers. gcloud splits them on spaces, and it
# leaves out a node that it cannot prepare and still exits with 0: whoever calls counts the answers.
on_workers() {
  reach_everywhere
  about_slice queued-resources ssh "$LAUNCH_NAME" "${everywhere[@]}" --command="$*"
}

# Shows what gcloud says on the way to workers, without the lines of every time.
tell_errors() {
  sed -e '/^S[CS][PH]: Attempting to connect/d' -e '/^Using s[cs][ph] batch size/d' \
    -e "s|^.*NOT_FOUND.*|there is no slice $LAUNCH_NAME in $LAUNCH_ZONE: $(typed up) makes it|" \
    -e "s|^bash: .*worker.sh: No such file.*|a worker is not set up: $(typed setup) does that|" >&2
}

# Copies files into a folder of every worker: FOLDER FILE...
copy_to_workers() {
  reach_everywhere
  about_slice queued-resources scp "${@:2}" "$LAUNCH_NAME:$1" "${everywhere[@]}"
  run "${gcloud[@]}" 2> >(tell_errors)
}

# Prints the end of a file at gs://, or nothing where there is none yet.
read_end_of() {
  local -a cat=(gcloud storage cat --range=-65536 "$1" --project="$LAUNCH_PROJECT")
  if [[ $dry_run ]]; then quoted "${cat[@]}" && return; fi
  limited "${cat[@]}" 2>/dev/null || true
}

# Prints the names at gs:// that match, or nothing.
list_files() {
  limited gcloud storage ls "$1" --project="$LAUNCH_PROJECT" 2>/dev/null || true
}

# What doctor asks: true with an answer, which is in `answer`.
ask() {
  if [[ $dry_run ]]; then quoted "$@" && return 1; fi
  answer=$(limited "$@" 2>/dev/null) && [[ $answer ]]
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
ask_bucket() { ask gcloud storage buckets describe "$LAUNCH_BUCKET" --format='value(location)'; }
