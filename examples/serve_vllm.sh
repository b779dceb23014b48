#!/usr/bin/env bash
# vLLM, unmodified, serves a real model tensor-parallel over ranks of hxcomm; curl asks it, the answer streams, and the
# backend's counters show that the collectives were hxcomm's:
#
#   bash examples/serve_vllm.sh "Why is the sky blue?"
#
# It makes an environment of its own for vLLM in build/ (once: 3.5 GB, 3 minutes). TP is the number of ranks (3: the
# model has 9 heads and 3 KV heads), PORT that of the server. What `vllm serve` is told can be read below; without
# HXCOMM_CPU=1 the same command runs as if hxcomm were not there.
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/setup.sh"
source "$ROOT/scripts/vllm_environment.sh"

QUESTION="${1:-What is the capital of France?}"
PORT="${PORT:-8123}"
URL="http://127.0.0.1:$PORT"
WORK="$(mktemp -d)"
mkdir "$WORK/stats"

SERVER=
stop_server() { # SIGTERM, as one stops it by hand; SIGKILL if it is still there after 60 s
  [[ -n "$SERVER" ]] || return 0
  kill -TERM "$SERVER" 2>/dev/null || true
  timeout 60 tail --pid="$SERVER" -f /dev/null || kill -KILL "$SERVER" 2>/dev/null || true
  wait "$SERVER" || true
  SERVER=
}
trap 'stop_server; rm -rf "$WORK"' EXIT
trap 'exit 130' INT TERM

say "starting vllm serve with ${TP:-3} ranks (about 40 s)"
HXCOMM_CPU=1 HXCOMM_STATS="$WORK/stats" "$VLLM_BIN/vllm" serve "$MODEL" --served-model-name SmolLM2 \
  --tensor-parallel-size "${TP:-3}" --dtype float32 --max-model-len 1024 --host 127.0.0.1 --port "$PORT" \
  >"$WORK/log" 2>&1 &
SERVER=$!
for ((second = 0; ; second++)); do
  curl -sf "$URL/health" >/dev/null && break
  kill -0 "$SERVER" 2>/dev/null && ((second < 300)) || {
    tail -n 40 "$WORK/log" >&2
    fail "the server did not come up; the end of its log stands above"
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

stop_server
say "what the collectives of each rank did (hxcomm stats)"
"$VLLM_BIN/hxcomm" stats "$WORK/stats"
