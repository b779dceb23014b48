#!/usr/bin/env bash
# The tests of vLLM over hxcomm, in the environment with vLLM (scripts/vllm_environment.sh makes it, or finds it). About
# 5 minutes; arguments go to pytest: bash scripts/test_engines.sh -k killed
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
source "$ROOT/scripts/vllm_environment.sh"
cd "$ROOT"
"$VLLM_BIN/python" -c 'import hypothesis, pytest' 2>/dev/null ||
  "$VLLM_BIN/python" -m pip install -q "pytest>=9" "hypothesis>=6.100"
exec timeout --kill-after=30 1500 "$VLLM_BIN/python" -m pytest tests/engines/test_vllm.py "$@"
