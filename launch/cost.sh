#!/usr/bin/env bash
# Usage: launch/cost.sh
#
# Prints the cost of the slices of this name so far and per day, from the dated prices in
# launch/prices.env (LAUNCH_PRICES); correct them for your region. Calls no API: it adds up the history
# that `up`, `babysit` and `down` recorded on this machine.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$launch_dir/preflight.sh"

# Prints `up|down SECONDS CHIPS LOW HIGH` for every lifetime of a slice: a `begin` and the next `end`.
lifetimes() {
  local what at accelerator slices provisioning since='' price
  while read -r what at accelerator slices provisioning _; do
    if [[ $what == begin && -z $since ]]; then
      since=$at
      price=$(print_prices "$accelerator" "$slices" "$provisioning") || exit
    elif [[ $what == end && $since ]]; then
      echo "down $((at - since)) $price"
      since=
    fi
  done <"$state_dir/history"
  [[ -z $since ]] || echo "up $(($(date +%s) - since)) $price"
}

parse_common "$@"
no_more_args
load_settings
load_prices
now=$(print_prices "$LAUNCH_ACCELERATOR" "$LAUNCH_NODE_COUNT" "$LAUNCH_PROVISIONING")
past=
[[ ! -f $state_dir/history ]] || past=$(lifetimes)

awk -v now="$now" -v what="$LAUNCH_NODE_COUNT x $LAUNCH_ACCELERATOR $LAUNCH_PROVISIONING" \
  -v date="$PRICES_DATE" '
  function usd(low, high) {
    return low == high ? sprintf("%.2f", low) : sprintf("%.2f to %.2f", low, high)
  }
  NF { state = $1; hours += $2 * $3 / 3600; low += $2 * $3 / 3600 * $4; high += $2 * $3 / 3600 * $5 }
  END {
    split(now, price, " ")
    printf "slice    %s, %d chips, %s now\n", what, price[1], state ? state : "down"
    printf "so far   %.1f chip-hours, USD %s\n", hours, usd(low, high)
    printf "a day    USD %s\n", usd(24 * price[1] * price[2], 24 * price[1] * price[3])
    printf "prices   USD %s a chip-hour, %s\n", usd(price[2] + 0, price[3] + 0), date
  }' <<<"$past"
[[ $LAUNCH_PROVISIONING != reserved ]] || log "a reservation costs money even when it is not used"
