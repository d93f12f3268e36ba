#!/usr/bin/env bash
# Usage: launch/setup.sh
#
# Installs uv, Python and the packages of requirements.lock (with hashes; libtpu included) on all workers
# at once, mounts the bucket if LAUNCH_MOUNT=yes, and checks how many devices JAX sees on each. May be
# repeated whenever no run is live.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$launch_dir/provider.sh"
source "$launch_dir/workers.sh"

parse_common "$@"
no_more_args
load_settings
python_version=$(<"$root/.python-version")

ssh_command mkdir -p grok-launch/incoming
run "${gcloud[@]}" 2> >(filter_errors) ||
  fail_unreached "not all workers could be reached; see $(verb_path status)"
copy_to_workers grok-launch/ "$launch_dir/worker.sh" "$launch_dir/progress.sh" "$root/requirements.lock" \
  "$root/requirements-uv.lock" ||
  fail_unreached "not all workers could be reached; retry the same command"
mounted=
[[ $LAUNCH_MOUNT == no ]] || mounted=${LAUNCH_BUCKET#gs://}
call_all_workers setup "$python_version" "$chips_per_host" ${mounted:+"$mounted"}
log "$(plural "$workers" worker) set up, $(plural "$chips_per_host" device) each"
