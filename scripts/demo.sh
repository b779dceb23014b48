#!/usr/bin/env bash
# Sets everything up, then decodes a real language model, tensor-parallel over 2 ranks of hxcomm.
# Arguments go to examples/tp_decode/generate.py and override these; NPROC is the number of ranks:
# NPROC=3 bash scripts/demo.sh --prompt "Once upon a time"
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec torchrun --standalone --nproc-per-node "${NPROC:-2}" "$ROOT/examples/tp_decode/generate.py" \
  --prompt "The capital of France is" --max-new-tokens 64 "$@"
