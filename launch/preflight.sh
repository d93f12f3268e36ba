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
    refuse "$name is ${!name}, as in the example: edit $settings, then run launch/doctor.sh"
  done
}

# Refuses a `grok train`, `batch` or `serve` whose config does not hold, or whose mesh does not fit the slice.
# Sets `checked_config` to all its keys, as YAML.
check_command() {
  checked_config=
  local grok=$root/.venv/bin/grok of=${command[1]:-}
  local -a options=(--of "$of") words=()
  local word
  [[ ${command[0]} == grok && $of =~ ^(train|batch|serve)$ ]] || return 0
  [[ -x $grok ]] || grok=$(type -P grok) || {
    log "the command's config was not checked: 'make env' in $root installs what checks it"
    return 0
  }
  options+=(--devices "$((chips * LAUNCH_NODE_COUNT))")
  [[ $of != batch ]] || options+=(--hosts "$workers")
  for word in "${command[@]:2}"; do [[ $word == --resume ]] || words+=("$word"); done
  checked_config=$(cd "$root" && JAX_PLATFORMS=cpu "$grok" config "${options[@]}" "${words[@]}" 2>&1) ||
    refuse "nothing was started: $(quoted "${command[@]:0:3}"): $(tail -n 1 <<<"${checked_config#error: }")"
}

# Refuses a `grok train` without a folder: each restart would begin another run.
check_folder() {
  [[ $checked_config && "${command[*]:0:2}" == 'grok train' && ! $(checked_value folder '') ]] || return 0
  refuse "nothing was started: the command names no folder, where a restart resumes: folder=$LAUNCH_BUCKET/runs/NAME would work"
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
