#!/usr/bin/env bash
# Builds the C++ tests with a sanitizer of the compiler and runs them; says what it found.
#
#   bash scripts/sanitize.sh [--quick] [thread] [address] [undefined]     # all three where none is named
#
# thread finds data races, address memory errors and leaks, undefined what C++ leaves undefined. --quick runs the stress
# program only, which is what the test suite does (tests/core/test_sanitizers.py).
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" "$ROOT/scripts/sanitize.py" "$@"
