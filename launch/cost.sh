#!/usr/bin/env bash
# Usage: launch/cost.sh
#
# What the slices of this name have cost so far, and what a day costs, from the prices in
# launch/prices.env (LAUNCH_PRICES), which are dated and are yours to correct. Asks nobody: it adds
# up what `up`, `babysit` and `down` noted on this machine.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Adds up: every `begin` runs until the next `end`, or until now.
chip_hours() {
  awk -v now="$(date +%s)" -v chips="$((chips * LAUNCH_NODE_COUNT))" '
    $1 == "begin" && !open { open = $2 }
    $1 == "end" && open { seconds += $2 - open; open = 0 }
    END { if (open) seconds += now - open; print seconds / 3600 * chips, open ? "up" : "down" }
  ' "$state_dir/history" 2>/dev/null || echo 0 down
}

parse_common "$@"
no_more_args
load_settings
[[ -f $LAUNCH_PRICES ]] || refuse "no prices at $LAUNCH_PRICES (LAUNCH_PRICES)"
# shellcheck source=launch/prices.env
source "$LAUNCH_PRICES"
kind=on_demand
[[ $LAUNCH_PROVISIONING != spot ]] || kind=spot
low=PRICE_${generation}_${kind}_LOW high=PRICE_${generation}_${kind}_HIGH
[[ -n ${!low:-} && -n ${!high:-} ]] || refuse "$low and $high are not in $LAUNCH_PRICES"

read -r hours now < <(chip_hours)
awk -v low="${!low}" -v high="${!high}" -v hours="$hours" -v chips="$((chips * LAUNCH_NODE_COUNT))" \
  -v what="$LAUNCH_NODE_COUNT x $LAUNCH_ACCELERATOR $LAUNCH_PROVISIONING" -v now="$now" \
  -v date="$PRICES_DATE" '
  function usd(factor) {
    return low == high ? sprintf("%.2f", low * factor) : sprintf("%.2f to %.2f", low * factor, high * factor)
  }
  BEGIN {
    printf "slice    %s, %d chips, %s now\n", what, chips, now
    printf "so far   %.1f chip-hours, USD %s\n", hours, usd(hours)
    printf "a day    USD %s\n", usd(24 * chips)
    printf "prices   USD %s a chip-hour, %s\n", usd(1), date
  }'
[[ $LAUNCH_PROVISIONING != reserved ]] || say "a reservation is paid for whether it is used or not"
