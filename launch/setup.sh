#!/usr/bin/env bash
# Usage: launch/setup.sh
#
# On all workers at once: uv, Python, and the packages of requirements.lock with their hashes (the
# TPU's among them), with LAUNCH_MOUNT the bucket as a folder; then checks how many devices JAX sees
# on each. May be repeated at any time that no run is live.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$launch_dir/provider.sh"
source "$launch_dir/workers.sh"

parse_common "$@"
no_more_args
load_settings
uv_version=$(sed -n 's/^UV_VERSION := //p' "$root/Makefile")
python_version=$(<"$root/.python-version")

on_workers mkdir -p grok-launch/incoming
run "${gcloud[@]}" 2> >(tell_errors) ||
  fail "not all workers could be reached; is $LAUNCH_NAME up? See $(typed status)"
copy_to_workers grok-launch/ "$launch_dir/worker.sh" "$launch_dir/progress.sh" "$root/requirements.lock" ||
  fail "not all workers could be reached; the same command may be repeated"
mounted=
[[ $LAUNCH_MOUNT == no ]] || mounted=${LAUNCH_BUCKET#gs://}
all_workers setup "$uv_version" "$python_version" "$chips_per_host" ${mounted:+"$mounted"}
say "$(counted "$workers" worker) set up, $(counted "$chips_per_host" device) each"
