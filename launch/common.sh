# shellcheck shell=bash
# Shared by all verbs: options, settings, messages, dry runs, waiting, and facts on accelerators.
# Sourced, never run. Settings are variables LAUNCH_*; the environment overrides the settings file.
# shellcheck disable=SC2034 # the scripts that source this use the variables that it sets

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "launch: this is bash $BASH_VERSION; 4.4 or newer is needed (on a Mac: brew install bash)" >&2
  exit 2
fi

launch_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$launch_dir")
verb=$(basename "$0" .sh)
dry_run=

warn() { printf 'launch %s: %s\n' "$verb" "$*" >&2; }
log() { [[ $dry_run ]] || warn "$@"; }
fail() { warn "$*" && exit 1; }
# For wrong settings or options: nothing was done.
refuse() { warn "$*" && exit 2; }

# The comment at a script's head is its help.
usage() {
  sed -n '2,/^[^#]/ { s/^# \{0,1\}//p; }' "$0"
  printf '\nAlso: --settings FILE, --dry-run (print the commands, do nothing), --help.\n'
}

# Parses the options that every verb has. Leaves the rest in `args`, and what follows -- in `command`.
parse_common() {
  settings=${LAUNCH_SETTINGS:-$launch_dir/settings.env}
  args=() command=()
  while (($#)); do
    case $1 in
      --help | -h) usage && exit 0 ;;
      --dry-run) dry_run=1 ;;
      --settings)
        (($# > 1)) || refuse "--settings needs a file"
        settings=$2 && shift
        ;;
      --settings=*) settings=${1#*=} ;;
      --) command=("${@:2}") && break ;;
      *) args+=("$1") ;;
    esac
    shift
  done
}

no_more_args() {
  local words=("${args[@]}" "${command[@]}")
  ((${#words[@]} == 0)) || refuse "unknown argument '${words[0]}'; see $verb.sh --help"
}

# Prints the command line of a verb: its own script, or the worked run that called this script.
verb_path() {
  if [[ ${LAUNCH_RUN:-} ]]; then echo "launch/runs/$LAUNCH_RUN.sh $1"; else echo "launch/$1.sh"; fi
}

# "1 worker", "4 workers".
plural() { if (($1 == 1)); then echo "1 $2"; else echo "$1 $2s"; fi; }

# Calls another verb with the same settings.
call_verb() {
  "$launch_dir/$1.sh" --settings "$settings" ${dry_run:+--dry-run} "${@:2}"
}

load_settings() {
  local example=$launch_dir/settings.env.example name
  local -A overrides=()
  [[ $settings == */* ]] || settings=./$settings # or `source` would search PATH for it
  [[ -f $settings ]] || refuse "no settings file: $(quoted cp "$example" "$settings"), then edit the copy"
  while read -r name; do overrides[$name]=${!name}; done < <(compgen -v LAUNCH_)
  trap 'refuse "$settings cannot be read, see above; write each line as NAME=value, without spaces around ="' EXIT
  # shellcheck source=launch/settings.env.example
  source "$settings"
  trap - EXIT
  while read -r name; do
    [[ -n ${overrides[$name]+set} ]] || grep -q "^$name=" "$example" ||
      refuse "$settings sets $name, which is not a setting; see $example"
  done < <(compgen -v LAUNCH_)
  for name in "${!overrides[@]}"; do printf -v "$name" %s "${overrides[$name]}"; done
  set_defaults
  check_settings
  : "${LAUNCH_RUNTIME:=$default_runtime}"
  state_dir=${LAUNCH_STATE:-${XDG_STATE_HOME:-$HOME/.local/state}/grok-launch}/$LAUNCH_NAME
}

set_defaults() {
  : "${LAUNCH_PROVISIONING:=spot}" "${LAUNCH_NODE_COUNT:=1}" "${LAUNCH_VALID_UNTIL:=}"
  : "${LAUNCH_NETWORK:=}" "${LAUNCH_SUBNETWORK:=}" "${LAUNCH_INTERNAL_IPS:=no}" "${LAUNCH_IAP:=no}"
  : "${LAUNCH_SERVICE_ACCOUNT:=}" "${LAUNCH_LABELS:=}" "${LAUNCH_BUCKET:=}" "${LAUNCH_MOUNT:=no}"
  : "${LAUNCH_ENV:=}"
  : "${LAUNCH_PRICES:=$launch_dir/prices.env}"
  : "${LAUNCH_POLL_SECONDS:=30}" "${LAUNCH_WAIT_SECONDS:=0}" "${LAUNCH_CALL_SECONDS:=900}"
  : "${LAUNCH_STOP_SECONDS:=600}" "${LAUNCH_BAD_POLLS:=3}" "${LAUNCH_MAX_STALLS:=5}"
  : "${LAUNCH_BACKOFF_SECONDS:=15}" "${LAUNCH_BACKOFF_MAX_SECONDS:=600}"
}

check_settings() {
  local name
  for name in LAUNCH_PROJECT LAUNCH_ZONE LAUNCH_NAME LAUNCH_ACCELERATOR; do
    [[ -n ${!name:-} ]] || refuse "$name is not set in $settings"
  done
  check_form LAUNCH_NAME '^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$' \
    'lower-case letters, digits and inner hyphens, at most 40'
  check_form LAUNCH_ZONE '^[a-z]+-[a-z]+[0-9]+-[a-z]$' 'write a zone as us-east5-a'
  check_form LAUNCH_PROVISIONING '^(spot|reserved|on-demand)$' 'set it to spot, reserved or on-demand'
  check_form LAUNCH_NODE_COUNT '^[1-9][0-9]*$' 'set it to the number of slices, 1 or more'
  check_form LAUNCH_BUCKET '^(gs://[a-z0-9._-]+)?$' 'write a bucket as gs://my-bucket, without a slash or a folder after it'
  check_form LAUNCH_MOUNT '^(yes|no)$' 'set it to yes or no'
  [[ $LAUNCH_MOUNT == no || -n $LAUNCH_BUCKET ]] || refuse "LAUNCH_MOUNT=yes needs a bucket in LAUNCH_BUCKET"
  check_form LAUNCH_INTERNAL_IPS '^(yes|no)$' 'set it to yes or no'
  check_form LAUNCH_IAP '^(yes|no)$' 'set it to yes or no'
  for name in LAUNCH_WAIT_SECONDS LAUNCH_CALL_SECONDS LAUNCH_STOP_SECONDS LAUNCH_BAD_POLLS \
    LAUNCH_BACKOFF_SECONDS LAUNCH_BACKOFF_MAX_SECONDS LAUNCH_MAX_STALLS; do
    check_form "$name" '^(0|[1-9][0-9]*)$' 'set it to an integer'
  done
  check_form LAUNCH_POLL_SECONDS '^[0-9]+(\.[0-9]+)?$' 'set it to a number of seconds'
  check_form LAUNCH_ENV '^[A-Za-z0-9_ ]*$' 'list names of variables without values: "HF_TOKEN FOO"'
  set_accelerator
}

check_form() { [[ ${!1} =~ $2 ]] || refuse "$1 is '${!1}'; $3"; }

# Sets generation, chips, hosts and chips_per_host of one slice, and its default_runtime.
set_accelerator() {
  [[ $LAUNCH_ACCELERATOR =~ ^(v4|v5litepod|v5p|v6e)-([1-9][0-9]*)$ ]] ||
    refuse "LAUNCH_ACCELERATOR is '$LAUNCH_ACCELERATOR'; set it to v4-N, v5litepod-N (v5e), v5p-N or v6e-N"
  generation=${BASH_REMATCH[1]} chips=${BASH_REMATCH[2]} chips_per_host=4
  if [[ $generation == v4 || $generation == v5p ]]; then
    ((chips % 8 == 0)) ||
      refuse "LAUNCH_ACCELERATOR is '$LAUNCH_ACCELERATOR'; N of $generation counts cores: 8, 16, 32, ..."
    chips=$((chips / 2))
  else
    [[ $chips =~ ^(1|4|8|16|32|64|128|256)$ ]] ||
      refuse "LAUNCH_ACCELERATOR is '$LAUNCH_ACCELERATOR'; N of $generation counts chips: 1, 4, 8, 16, 32, ... 256"
    ((chips > 8)) || chips_per_host=$chips
  fi
  hosts=$((chips / chips_per_host))
  workers=$((hosts * LAUNCH_NODE_COUNT))
  case $generation in
    v4) default_runtime=tpu-ubuntu2204-base ;;
    v5litepod) generation=v5e default_runtime=v2-alpha-tpuv5-lite ;;
    v5p) default_runtime=v2-alpha-tpuv5 ;;
    v6e) default_runtime=v2-alpha-tpuv6e ;;
  esac
}

# Quotes words into one line that a shell reads back as the same words.
quoted() {
  local word line=
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9@%+=:,./_-]+$ ]]; then
      line+=" $word"
    else
      line+=" '${word//\'/\'\\\'\'}'"
    fi
  done
  printf '%s\n' "${line:1}"
}

# Runs a command with a timeout of LAUNCH_CALL_SECONDS, in case ssh hangs.
limited() {
  local timeout
  timeout=$(type -P timeout || type -P gtimeout) ||
    fail "'timeout' is not on PATH (on a Mac: brew install coreutils)"
  "$timeout" --kill-after=10 "$LAUNCH_CALL_SECONDS" "$@"
}

# The same; in a dry run prints the command instead.
run() {
  if [[ $dry_run ]]; then quoted "$@"; else limited "$@"; fi
}

# Formats seconds for people.
duration() {
  local s=$1
  if ((s < 120)); then
    echo "$s s"
  elif ((s < 7200)); then
    echo "$((s / 60)) min"
  else
    echo "$((s / 3600)) h $((s % 3600 / 60)) min"
  fi
}

# Waits one poll of a wait that started at SECONDS=$3; gives up after LAUNCH_WAIT_SECONDS (0: never).
wait_for() {
  local what=$1 now=$2 waited=$((SECONDS - $3))
  if ((LAUNCH_WAIT_SECONDS && waited >= LAUNCH_WAIT_SECONDS)); then
    fail "gave up waiting for $what after $(duration "$waited") (LAUNCH_WAIT_SECONDS); now: $now"
  fi
  log "waiting for $what: $now, $(duration "$waited") so far"
  sleep "$LAUNCH_POLL_SECONDS"
}

# Shared by launch/runs/*.sh: calls a verb with that run's settings. babysit, run and doctor also get its
# command (the arguments); the first two with the keys that the user adds after --. Call after load_settings.
worked_run() {
  local called=${args[0]:-babysit}
  export LAUNCH_RUN=$verb
  case $called in
    babysit | run)
      ((${#args[@]} <= 1)) || refuse "unknown argument '${args[1]}'; see $verb.sh --help"
      local word
      for word in "${command[@]}"; do
        [[ $word == *=* || "$2 $word" == 'train --resume' ]] ||
          refuse "'$word' is not KEY=VALUE: this run has its own command and takes only keys (and --resume, to train) after --"
      done
      [[ $LAUNCH_BUCKET ]] || refuse "LAUNCH_BUCKET is not set; this run reads from a bucket and writes to it"
      call_verb "$called" -- "$@" "${command[@]}"
      ;;
    up | setup | sync | logs | status | tunnel | stop | down | cost | doctor)
      ((${#command[@]} == 0)) || refuse "only babysit and run take arguments after --"
      [[ $called != doctor ]] || args+=(-- "$@")
      call_verb "${args[@]}"
      ;;
    *=*) refuse "keys go after --: launch/runs/$LAUNCH_RUN.sh -- $(quoted "${args[@]}")" ;;
    *) refuse "unknown verb '$called'; launch/README.md lists the verbs" ;;
  esac
}

# Creates this slice's own folder for state and for files to send.
make_state_dir() {
  [[ $dry_run ]] || (umask 077 && mkdir -p "$state_dir")
}

# Writes the newest request of the user, `stop`, `down PID` or `up`, for a babysitter, which then ends.
write_request() {
  echo "$*" >"$state_dir/stopped.new"
  mv "$state_dir/stopped.new" "$state_dir/stopped"
}

# Appends a line `begin|end EPOCH ACCELERATOR SLICES PROVISIONING ZONE`, which `cost` adds up.
record_history() {
  make_state_dir
  local line="$1 $2 $LAUNCH_ACCELERATOR $LAUNCH_NODE_COUNT $LAUNCH_PROVISIONING $LAUNCH_ZONE"
  grep -qxF -- "$line" "$state_dir/history" 2>/dev/null || echo "$line" >>"$state_dir/history"
}
