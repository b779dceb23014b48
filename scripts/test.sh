#!/usr/bin/env bash
# Sets everything up, then checks style and types and passes the tests. Arguments go to pytest:
# bash scripts/test.sh tests/schedule -k ring
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"

failed=()
check() {
  say "$1"
  "${@:2}" || failed+=("$1")
}
check "ruff check" python -m ruff check .
check "ruff format" python -m ruff format --check .
check "mypy --strict" python -m mypy
check "clang-format" bash -c 'find csrc -name "*.cpp" -o -name "*.h" | xargs clang-format --dry-run -Werror'

# Two workers: one runs all tests that start ranks, one after another, the other the rest (tests/conftest.py). Every
# test has a limit of its own; this one is for what no test covers (collection, a fixture's end).
status=0
timeout --kill-after=30 1800 python -m pytest -n 2 "$@" || status=$?
if ((${#failed[@]})); then
  printf 'failed before the tests: %s (see above)\n' "${failed[@]}" >&2
  ((status)) || status=1
fi
exit "$status"
