# shellcheck shell=bash
# Reads a run's progress: the newest step of a training run, the finished shards of a batch, when a server
# was healthy. Sourced on this machine and on the workers, never run.
# shellcheck disable=SC2034 # the scripts that source this use the variables that it sets

# Sets progress (the newest step), loss, and the host that has been slow for long, from the end of metrics.jsonl.
read_metrics() {
  local line
  progress=- loss=- total=- slow=-
  line=$(grep '"loss"' <<<"$1" | tail -n 1 || true)
  if [[ $line =~ \"step\":\ ?([0-9]+) ]]; then progress=${BASH_REMATCH[1]}; fi
  if [[ $line =~ \"loss\":\ ?([-+.0-9eE]+|NaN) ]]; then loss=${BASH_REMATCH[1]}; fi
  if [[ $line =~ \"slow_host\":\ ?\"([^\"\ ]+)\" ]]; then slow=${BASH_REMATCH[1]}; fi
}

# Sets progress (finished shards) and total from the names of answers and from job.json.
read_shards() {
  local requests shard_size
  progress=- loss=- total=-
  [[ $2 =~ \"requests\":\ ?([0-9]+) ]] || return 0
  requests=${BASH_REMATCH[1]}
  [[ $2 =~ \"shard_size\":\ ?([0-9]+) ]] || return 0
  shard_size=${BASH_REMATCH[1]}
  total=$(((requests + shard_size - 1) / shard_size))
  progress=$(grep -c '[0-9]\.jsonl$' <<<"$1" || true)
}

# Sets progress to now, in seconds since 1970, if the server at HOST:PORT is healthy.
read_health() {
  progress=- loss=- total=-
  ! curl --silent --fail --max-time 5 --output /dev/null "http://$1/health" || progress=$(date +%s)
}
