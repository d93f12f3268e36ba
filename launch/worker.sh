#!/usr/bin/env bash
# The workers' side of launch: `setup` sends this file to every host, and the other verbs call it there
# over ssh. Output lines are prefixed with the worker's name; the last one, "@ ...", is its report.
set -euo pipefail

home=$HOME/grok-launch
run=$home/run
export PATH="$home/.venv/bin:$HOME/.local/bin:$PATH"
# shellcheck source=launch/progress.sh
source "$home/progress.sh"
# Without this, JAX would fall back to the CPU if it finds no TPU.
export JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}"

reported=
report() { printf '@ %s\n' "$*" && reported=1; }
failed() { report "failed=$*" && exit 1; }
as_root() { if ((EUID)); then sudo -n "$@"; else "$@"; fi; }

# A run holds this lock while any of its processes lives, whatever happens to ssh or to this file.
run_is_live() { [[ -e $run/lock ]] && ! flock -n "$run/lock" true; }
not_under_a_run() {
  ! run_is_live || failed "a run is live here (pid $(cat "$run/pid")): stop it first"
}

# setup PYTHON_VERSION DEVICES [BUCKET]
setup() {
  not_under_a_run
  command -v uv >/dev/null ||
    python3 -m pip install --quiet --user --require-hashes --requirement "$home/requirements-uv.lock"
  [[ -x $home/.venv/bin/python ]] || uv venv --quiet --python "$1" "$home/.venv"
  uv pip sync --quiet --python "$home/.venv/bin/python" --require-hashes "$home/requirements.lock"
  [[ ! -e $home/src ]] || install_code
  [[ -z ${3:-} ]] || mount_bucket "$3"
  # All hosts of a slice do this at once: a TPU starts on all of them or not at all.
  local devices
  devices=$(timeout 300 python -c 'import jax; print(jax.local_device_count())') ||
    failed "JAX devices no TPU here in 300 s; 'stop --now' kills what may hold it"
  ((devices == $2)) || failed "JAX sees $devices devices here, expected $2"
  report "ok devices=$devices python=$(python -c 'import platform; print(platform.python_version())')"
}

# Mounts the bucket as ~/grok-launch/bucket, for programs that read local files only.
mount_bucket() {
  mkdir -p "$home/bucket"
  ! mountpoint -q "$home/bucket" || return 0
  command -v gcsfuse >/dev/null || install_gcsfuse
  gcsfuse --implicit-dirs "$1" "$home/bucket" >/dev/null
}

install_gcsfuse() {
  local keys=/usr/share/keyrings/cloud.google.asc at=https://packages.cloud.google.com/apt
  curl --silent --show-error --fail "$at/doc/apt-key.gpg" | as_root tee "$keys" >/dev/null
  echo "deb [signed-by=$keys] $at gcsfuse-$(lsb_release -cs) main" |
    as_root tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  as_root apt-get -qq update && as_root apt-get -qq -o DPkg::Lock::Timeout=300 install -y gcsfuse
}

install_code() {
  uv pip install --quiet --python "$home/.venv/bin/python" --no-deps --no-build-isolation \
    --editable "$home/src"
}

# unpack STAMP: installs the tarball of that name as the code to run.
unpack() {
  local code=$home/code/$1
  not_under_a_run
  [[ -x $home/.venv/bin/python ]] || failed "no environment here yet: run setup first"
  rm -rf "$home/code" && mkdir -p "$code" "$home/runs"
  tar -xzf "$home/incoming/grok-$1.tar.gz" -C "$code"
  rm -f "$home"/incoming/grok-*.tar.gz
  ln -s "$home/runs" "$home/bucket" "$code/"
  ln -sfn "$code" "$home/src"
  install_code
  report "ok code=$1"
}

# start: runs incoming/command.sh detached, with the variables of incoming/env.
start() {
  [[ -e $home/src ]] || failed "no code here yet: run sync first"
  mkdir -p "$run"
  exec 9>>"$run/lock"
  flock -n 9 || failed "a run is live here (pid $(cat "$run/pid")): stop it first"
  rm -rf "$run/exit" "$run/pid" "$run/stopping"
  mv "$home/incoming/command.sh" "$home/incoming/env" "$home/incoming/progress" "$run/"
  chmod 600 "$run/env"
  setsid --fork bash "$home/worker.sh" supervise </dev/null >>"$run/log" 2>&1
  local tries=0
  until [[ -e $run/pid ]]; do
    ((++tries < 200)) || failed "the run did not start: see logs"
    sleep 0.05
  done
  report "ok pid=$(cat "$run/pid")"
}

# The process that `start` leaves behind: waits for the command and records its exit code.
supervise() {
  local child code
  cd "$home/src"
  printf '=== %s: code %s: %s\n' "$(date -u +%FT%TZ)" "$(code_stamp)" "$(tail -n 1 "$run/command.sh")"
  set -a
  # shellcheck source=/dev/null
  source "$run/env"
  set +a
  # A shutdown signals all processes; this one exits only after the command.
  trap : TERM INT HUP
  set -m # the command gets its own process group, so that `stop` can kill all of it
  bash "$run/command.sh" &
  child=$!
  echo "$child" >"$run/pid.new" && mv "$run/pid.new" "$run/pid"
  # A signal ends a `wait` early; bash keeps the exit code of a child that has exited.
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
  wait "$child" && code=0 || code=$?
  printf '=== %s: exit code %s\n' "$(date -u +%FT%TZ)" "$code"
  echo "$code" >"$run/exit.new" && mv "$run/exit.new" "$run/exit"
}

code_stamp() { basename "$(readlink "$home/src" 2>/dev/null || echo none)"; }

# state is running, exited (with a code), lost (gone without a code) or idle.
status() {
  local state=idle code=- pid=- unit folder progress=- total=- loss=- slow=-
  if [[ -e $run/pid ]]; then
    pid=$(cat "$run/pid")
    state=lost
    if [[ -e $run/exit ]]; then
      state=exited code=$(cat "$run/exit")
    elif run_is_live; then
      state=running
    fi
    cd "$home/src"
    read -r unit folder <"$run/progress" || true
    if [[ $unit == shard ]]; then
      read_shards "$(ls "$folder/answers" 2>/dev/null)" "$(cat "$folder/job.json" 2>/dev/null)"
    elif [[ $unit == serve ]]; then
      read_health "$folder"
    elif [[ $folder ]]; then
      read_metrics "$(tail -n 100 "$folder/metrics.jsonl" 2>/dev/null)"
    fi
  fi
  report "state=$state code=$code pid=$pid progress=$progress total=$total loss=$loss slow=$slow stamp=$(code_stamp) ${1:-}"
}

# logs LINES [follow]
logs() {
  [[ -e $run/log ]] || failed "no run has been started here"
  if [[ ${2:-} == follow ]]; then
    tail -n "$1" -F "$run/log"
  else
    tail -n "$1" "$run/log"
    report ok
  fi
}

# stop SECONDS: asks the run to save and exit; after that time kills whatever holds the TPU. Asks once,
# since a second SIGTERM ends a grok that still saves.
stop() {
  local until=$((SECONDS + $1)) ended=gently
  if run_is_live; then
    (($1 == 0)) || ! mkdir "$run/stopping" 2>/dev/null || kill -TERM "$(cat "$run/pid")" 2>/dev/null || true
    while run_is_live && ((SECONDS < until)); do sleep "${LAUNCH_WORKER_POLL:-1}"; done
    if run_is_live; then
      ended=killed
      kill -KILL -- "-$(cat "$run/pid")" 2>/dev/null || true
    fi
  fi
  if end_device_holders; then ended=killed; fi
  as_root rm -f "${LAUNCH_LIBTPU_LOCK:-/tmp/libtpu_lockfile}"
  # `supervise` writes the exit code a moment later.
  until=$((SECONDS + 10))
  while run_is_live && ((SECONDS < until)); do sleep "${LAUNCH_WORKER_POLL:-1}"; done
  status "ended=$ended"
}

# Kills processes by the device files that they hold open, since names mislead. True if there were any.
end_device_holders() {
  local device devices=()
  for device in ${LAUNCH_DEVICES:-/dev/vfio/[0-9]* /dev/accel[0-9]*}; do
    [[ ! -e $device ]] || devices+=("$device")
  done
  ((${#devices[@]})) && as_root fuser --kill -KILL "${devices[@]}" >/dev/null 2>&1
}

main() {
  local name asked=$1
  name=$(hostname)
  (
    trap '[[ $reported ]] || report "failed=$asked exited early; the lines above say why"' EXIT
    "$@"
  ) 2>&1 | sed -u "s/^/[$name] /"
}

# Bash reads the whole `case` before it runs it, and `exit` ends it there, because by then this file may
# have been replaced by another version.
case ${1:-} in
  supervise)
    supervise
    exit
    ;;
  setup | unpack | start | status | logs | stop)
    main "$@"
    exit
    ;;
  *) echo "worker.sh: no verb '${1:-}'" >&2 && exit 2 ;;
esac
