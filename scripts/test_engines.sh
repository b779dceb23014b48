#!/usr/bin/env bash
# The tests of vLLM over hxcomm with a real model, and of SGLang's platform discovery, in the environment that
# scripts/vllm_environment.sh makes or finds. Eight engines start, six of them of a model of four layers: 415 s on two cores
# that others used as well. Arguments go to pytest:
# bash scripts/test_engines.sh -k killed
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
source "$ROOT/scripts/vllm_environment.sh"
cd "$ROOT"
"$VLLM_BIN/python" -c 'import hypothesis, pytest' 2>/dev/null ||
  "$VLLM_BIN/python" -m pip install -q "pytest>=9" "hypothesis>=6.100"
# Without its dependencies, which name another torch: its discovery of platforms needs none of them.
"$VLLM_BIN/python" -m pip install -q --no-deps sglang==0.5.23 || say "SGLang cannot be installed here: its tests skip"
# Longer than elsewhere: an engine takes 20 to 60 s to start, and one test starts two.
exec timeout --kill-after=30 1500 "$VLLM_BIN/python" -m pytest -o faulthandler_timeout=600 \
  tests/engines/test_vllm.py tests/engines/test_sglang.py "$@"
