# shellcheck shell=bash
# Checks on this machine before anything costs money. Sourced after common.sh, never run.
# shellcheck disable=SC2154 # the variables of common.sh

# Prints the names of settings that still have the example's placeholder.
example_settings() {
  [[ $LAUNCH_PROJECT != my-project ]] || echo LAUNCH_PROJECT
  [[ $LAUNCH_BUCKET != gs://my-bucket ]] || echo LAUNCH_BUCKET
}

refuse_example_settings() {
  local name
  [[ ! $dry_run ]] || return 0
  for name in $(example_settings); do
    refuse "$name is ${!name}, as in the example: edit $settings, then run $(verb_path doctor)"
  done
}

# Refuses a `grok` command that could not run on the slice: an unknown subcommand, a config that does not
# hold, a mesh that does not fit. Sets `grok_words` to the command from `grok` on, `subcommand`, and
# `checked_config` to all keys of the config, as YAML; they are empty for other programs.
check_command() {
  local grok=$root/.venv/bin/grok
  checked_config=''
  set_grok_words
  [[ $subcommand ]] || return 0
  set_config_words
  check_files_are_sent
  [[ -x $grok ]] || grok=$(type -P grok) || {
    log "the command's config was not checked: 'make env' in $root installs what checks it"
    return 0
  }
  case $subcommand in
    train | batch | serve | calibrate) check_config ;;
    *)
      [[ $("$grok" "$subcommand" --help 2>&1) != *'No such command'* ]] ||
        refuse "nothing was started: grok has no command '$subcommand'; train, batch, serve, eval and calibrate run on a slice"
      ;;
  esac
}

# `timeout 1h grok ...` and `env A=1 grok ...` are commands of grok, too.
set_grok_words() {
  local i
  grok_words=() subcommand=''
  for i in "${!command[@]}"; do
    if [[ ${command[i]} == grok ]]; then
      grok_words=("${command[@]:i}") subcommand=${command[i + 1]:-}
      return
    fi
    [[ ${command[i]} =~ ^(timeout|env|-.*|[0-9.]+[smhd]?|[A-Za-z_0-9]+=.*)$ ]] || return 0
  done
}

# Sets `config_words` to those that `grok config` checks, without the subcommand's options, and
# `config_name` to the config that the user named; both are empty for other subcommands.
set_config_words() {
  local i
  config_words=() config_name=''
  [[ $subcommand =~ ^(train|batch|serve|calibrate)$ ]] || return 0
  for ((i = 2; i < ${#grok_words[@]}; i++)); do
    case $subcommand.${grok_words[i]} in
      train.--resume | calibrate.--cpu-time | calibrate.--*=*) ;;
      calibrate.--*) i=$((i + 1)) ;;
      *) config_words+=("${grok_words[i]}") ;;
    esac
  done
  [[ ${config_words[0]:-=} == *=* ]] || config_name=${config_words[0]}
  # Without a config, calibrate chooses one by the devices; all have the same keys.
  [[ $subcommand != calibrate || $config_name ]] || config_words=(grok-10m "${config_words[@]}")
}

# Refuses a config that is a file here and would not be on the slice.
check_files_are_sent() {
  local problem
  [[ $config_name ]] || return 0
  problem=$(cd "$root" && unsent_file "$config_name")
  [[ ! $problem ]] || refuse "nothing was started: $problem"
}

# Prints why a config, or one that it extends, would not be on the slice: `sync` sends what git tracks. A name
# that is no file here is a preset's, or `grok config` refuses it.
unsent_file() {
  local file=$1 base _
  # Not forever: a config may extend itself, which `grok config` refuses.
  for _ in {1..20}; do
    [[ -f $file ]] || file=${file%/}/config.yaml # of the folder of a run
    [[ -f $file ]] || return 0
    if [[ $file == "$root"/* && $file != */../* ]]; then
      echo "the slice has no $file: name it by its path in the repository, ${file#"$root"/}" && return
    elif [[ $file == /* || $file == ../* ]]; then
      echo "$file is not in the repository, and \`sync\` sends nothing else: copy it into $root, and git add it there" && return
    fi
    if ! git ls-files --error-unmatch -- "$file" >/dev/null 2>&1; then
      echo "$file is not in git, and \`sync\` sends what git tracks: $(quoted git add "$file")" && return
    fi
    base=$(sed -n "s/^extends: *[\"']\{0,1\}\([^\"' #]*\).*/\1/p" "$file")
    [[ $base ]] || return 0
    [[ $base == /* || $file != */* ]] || base=${file%/*}/$base
    file=$base
  done
}

check_config() {
  local -a options=(--of "${subcommand/calibrate/train}")
  local problem
  [[ $subcommand == calibrate ]] || options+=(--devices "$((chips * LAUNCH_NODE_COUNT))")
  [[ $subcommand != batch ]] || options+=(--hosts "$workers")
  if print_config "${config_words[@]}"; then
    problem=$(slice_problem)
    if [[ ! $problem ]]; then check_data && return; fi
  else
    problem=$(tail -n 1 <<<"${checked_config#error: }")
  fi
  if ((LAUNCH_NODE_COUNT > 1)) && spans_slices; then advise_slices; fi
  refuse "nothing was started: $(quoted grok "$subcommand" ${config_name:+"$config_name"}): $problem"
}

# Prints why a mesh that fits the devices does not fit the slices that they are in, which `grok config` does
# not know of.
slice_problem() {
  local axis size slices='' others=1
  ((LAUNCH_NODE_COUNT > 1)) && spans_slices || return 0
  for axis in slice data expert tensor; do
    size=$(sed -n "/^mesh:/,/^[a-z]*:/s/^  $axis: *\\(-\\{0,1\\}[0-9]*\\).*/\\1/p" <<<"$checked_config")
    [[ $size ]] || return 0 # nothing was checked
    if [[ $axis == slice ]]; then slices=$size; else others=$((others * size)); fi
  done
  ((slices != -1)) || slices=$((chips * LAUNCH_NODE_COUNT / others))
  ((slices == LAUNCH_NODE_COUNT)) || echo "mesh.slice=$slices, and the settings request $LAUNCH_NODE_COUNT slices"
}

# False of a batch job whose hosts have a mesh each.
spans_slices() {
  local checked_config options=(--of batch)
  [[ $subcommand != batch ]] || { print_config "${config_words[@]}" && [[ $(checked_value replica '') != host ]]; }
}

# Replaces the advice in `problem`, of `grok config`, by one that has a mesh of LAUNCH_NODE_COUNT slices.
advise_slices() {
  local slices="mesh.slice=$LAUNCH_NODE_COUNT" with_slices
  if print_config "${config_words[@]}" "$slices"; then
    problem="${problem%%; *}; $slices, for LAUNCH_NODE_COUNT=$LAUNCH_NODE_COUNT, would work."
    return
  fi
  with_slices=$(tail -n 1 <<<"${checked_config#error: }")
  case $with_slices in
    "$problem") ;; # not of the mesh, or its slices are right
    *"; mesh slice=$LAUNCH_NODE_COUNT x "*) problem="${problem%%; *}; ${with_slices##*; }" ;;
    *"; mesh slice="*) problem="${with_slices%%; *}; no mesh of $LAUNCH_NODE_COUNT slices (LAUNCH_NODE_COUNT) fits." ;;
    *) problem="${problem%%; *}; with $slices, for LAUNCH_NODE_COUNT=$LAUNCH_NODE_COUNT: $with_slices" ;;
  esac
}

# Sets `checked_config` to what `grok config` prints: all keys of a config, or why it does not hold.
print_config() {
  checked_config=$(cd "$root" && JAX_PLATFORMS=cpu "$grok" config "${options[@]}" "$@" 2>&1)
}

# Refuses a `grok train` that names no data or no tokenizer; `grok config` prints such configs.
check_data() {
  local data bucket=${LAUNCH_BUCKET:-gs://my-bucket}
  [[ $subcommand == train ]] || return 0
  data=$(sed -n '/^data:/,/^[a-z]/p' <<<"$checked_config")
  if grep -q '^  train: \[\]' <<<"$data" && grep -q '^  datasets: \[\]' <<<"$data"; then
    refuse "nothing was started: the command names no data: 'data.datasets=[{path: $bucket/data/train, weight: 1}]' would work"
  fi
  ! grep -q '^  tokenizer: ""' <<<"$data" ||
    refuse "nothing was started: the command names no tokenizer: data.tokenizer=$bucket/data/tokenizer.model would work"
}

# Refuses a `grok train` without a folder, where each restart would begin another run, and a folder on a
# worker's disk: the babysitter replaces a lost slice, and its disks are deleted with it.
check_folder() {
  local folder='' key=folder word bucket=${LAUNCH_BUCKET:-gs://my-bucket}
  [[ $subcommand =~ ^(train|batch)$ ]] || return 0
  [[ $subcommand == train ]] || key=output
  for word in "${grok_words[@]}"; do [[ $word != "$key"=* ]] || folder=${word#*=}; done
  folder=$(checked_value "$key" "$folder")
  [[ $folder || $subcommand == batch || ! $checked_config ]] ||
    refuse "nothing was started: the command names no folder, where a restart resumes: folder=$bucket/runs/NAME would work"
  ! is_on_worker_disk "$folder" ||
    refuse "nothing was started: $key=$folder is on the worker's disk, which is deleted with a slice that is preempted or lost: $key=$bucket/${folder#bucket/} would work"
}

# True of relative paths, except in the mounted bucket. An absolute path may be a disk that outlives slices.
is_on_worker_disk() {
  [[ $1 && $1 != /* && $1 != *://* ]] && [[ $LAUNCH_MOUNT == no || $1 != bucket/* ]]
}

# Refuses a command with a gs:// bucket that does not exist: its run would fail on a slice that costs money.
# The babysitter asks once, before the first slice, and not again at each start.
check_buckets() {
  local bucket
  for bucket in $(command_buckets); do
    ! bucket_is_missing "$bucket" ||
      refuse "nothing was started: bucket $bucket does not exist: $(bucket_creation "$bucket") creates it"
  done
}

# Prints the gs:// buckets that the command or its config names, and the one to mount.
command_buckets() {
  {
    quoted "${command[@]}"
    printf '%s\n' "$checked_config"
    [[ $LAUNCH_MOUNT == no ]] || echo "$LAUNCH_BUCKET"
  } | sed 's/ # .*//' | grep -oE 'gs://[a-z0-9][a-z0-9._-]*' | sort -u
}

# Prints the command that creates a bucket in the region of the zone.
bucket_creation() {
  echo "gcloud storage buckets create $1 --location=${LAUNCH_ZONE%-*} --project=$LAUNCH_PROJECT"
}

# Prints the value of a top-level key of the checked config, or what stands for it if nothing was checked.
checked_value() {
  local value
  value=$(sed -n "s/^$1: *\"\{0,1\}\([^\" ]*\).*/\1/p" <<<"$checked_config")
  echo "${value:-$2}"
}

# Prints `CHIPS LOW HIGH`: the chips of LAUNCH_NODE_COUNT slices, and the price range of a chip-hour.
print_prices() {
  local LAUNCH_ACCELERATOR=$1 LAUNCH_NODE_COUNT=$2 kind=on_demand low high
  set_accelerator
  [[ $3 != spot ]] || kind=spot
  low=PRICE_${generation}_${kind}_LOW high=PRICE_${generation}_${kind}_HIGH
  [[ -n ${!low:-} && -n ${!high:-} ]] || refuse "$low and $high are not in $LAUNCH_PRICES"
  echo "$((chips * LAUNCH_NODE_COUNT)) ${!low} ${!high}"
}

load_prices() {
  [[ -f $LAUNCH_PRICES ]] || refuse "there is no price file $LAUNCH_PRICES (LAUNCH_PRICES)"
  # shellcheck source=launch/prices.env
  source "$LAUNCH_PRICES"
}

# Prints what the slice of the settings costs while it is up.
price() {
  load_prices
  print_prices "$LAUNCH_ACCELERATOR" "$LAUNCH_NODE_COUNT" "$LAUNCH_PROVISIONING" |
    awk -v what="$LAUNCH_NODE_COUNT x $LAUNCH_ACCELERATOR $LAUNCH_PROVISIONING" -v date="$PRICES_DATE" '
    function usd(low, high) {
      return low == high ? sprintf("%.2f", low) : sprintf("%.2f to %.2f", low, high)
    }
    { printf "%s costs USD %s an hour, %s a day, until down (prices %s)\n", what, usd($1 * $2, $1 * $3), usd(24 * $1 * $2, 24 * $1 * $3), date }'
}
