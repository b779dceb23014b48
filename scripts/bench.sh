#!/usr/bin/env bash
# Measures collectives of hxcomm against gloo, in the same run of the same machine, at 2 and 4 ranks.
# Arguments go to hxcomm.bench: bash scripts/bench.sh --floor
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

for ranks in 2 4; do
  for backend in gloo hxcomm; do
    say "$ranks ranks, $backend"
    torchrun --standalone --nproc-per-node "$ranks" -m hxcomm.bench --backend "$backend" "$@"
  done
done
