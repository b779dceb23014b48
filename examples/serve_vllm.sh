#!/usr/bin/env bash
# vLLM, unmodified, serves a real model tensor-parallel over ranks of hxcomm; curl asks it, the answer streams, and the
# backend's counters show that the collectives were hxcomm's:
#
#   bash examples/serve_vllm.sh "Why is the sky blue?"
#
# It makes an environment of its own for vLLM in build/ (once: 3.5 GB, 3 minutes). Three ranks, because the
# model has 9 heads and 3 KV heads. PORT is the server's. What `vllm serve` is told can be read below; without HXCOMM_CPU=1
# the same command runs as if hxcomm were not there.
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/setup.sh"
QUESTION="${1:-What is the capital of France?}"
PORT="${PORT:-8123}"
URL="http://127.0.0.1:$PORT"
if (: <"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; then
  fail "port $PORT is in use; take another one: PORT=$((PORT + 1)) bash $0"
fi
source "$ROOT/scripts/vllm_environment.sh"

LOG="$ROOT/build/serve_vllm.log"
WORK="$(mktemp -d)"
mkdir "$WORK/stats"

SERVER=
stop_server() { # SIGTERM, as one stops it by hand; SIGKILL if it is still there after so many seconds
  [[ -n "$SERVER" ]] || return 0
  kill -TERM "$SERVER" 2>/dev/null || true
  timeout "$1" tail --pid="$SERVER" -f /dev/null || kill -KILL "$SERVER" 2>/dev/null || true
  wait "$SERVER" || true
  SERVER=
}
trap 'stop_server 5; rm -rf "$WORK"' EXIT
trap 'exit 130' INT TERM

# Eager, because compiling takes a minute or two at the first start. With a shutdown timeout the ranks end by themselves
# and so with their counters complete; without, by SIGKILL.
say "starting vllm serve with 3 ranks (about 40 s)"
HXCOMM_CPU=1 HXCOMM_STATS="$WORK/stats" VLLM_RPC_BASE_PATH="$WORK" "$VLLM_BIN/vllm" serve "$MODEL" \
  --served-model-name SmolLM2 --tensor-parallel-size 3 --dtype float32 --max-model-len 1024 --enforce-eager \
  --host 127.0.0.1 --port "$PORT" --shutdown-timeout 20 >"$LOG" 2>&1 &
SERVER=$!
for ((second = 0; ; second++)); do
  curl -sf "$URL/health" >/dev/null && break
  kill -0 "$SERVER" 2>/dev/null && ((second < 300)) || {
    mapfile -t errors < <(grep -av WARNING "$LOG" | grep -oE '\b\w+Error: .*' | awk '!seen[$0]++' | head -n 5)
    fail "the server did not come up; its log is $LOG" "${errors[@]}"
  }
  sleep 1
done

say "asking $URL/v1/chat/completions: $QUESTION"
request="$(QUESTION="$QUESTION" "$PYTHON" -c 'import json, os
message = {"role": "user", "content": os.environ["QUESTION"]}
print(json.dumps({"model": "SmolLM2", "messages": [message], "max_tokens": 64, "temperature": 0, "stream": True}))')"
curl -sSN --fail-with-body "$URL/v1/chat/completions" -H 'Content-Type: application/json' -d "$request" |
  "$PYTHON" -c 'import json, sys
for line in sys.stdin:
    if line.startswith("data: {"):
        print(json.loads(line[6:])["choices"][0]["delta"].get("content") or "", end="", flush=True)
print()'

stop_server 60
say "what the collectives of each rank did (hxcomm stats): 61 all_reduces and an all_gather for each forward"
"$VLLM_BIN/hxcomm" stats "$WORK/stats"
