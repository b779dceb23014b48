#!/usr/bin/env bash
# Measures collectives of hxcomm against gloo, interleaved in one run, at 2 and 4 ranks.
#
#   bash scripts/bench.sh [--mpi] [arguments of hxcomm.bench]
#   bash scripts/bench.sh --floor                                # and what the machine allows
#   bash scripts/bench.sh --mpi --sizes 4KiB,16KiB --rounds 5    # all_reduce against MPICH and Open MPI, too
#
# RANKS="2 3" chooses other numbers of ranks. --mpi makes a virtual environment for each MPI (from PyPI, in build/) and
# prints the medians of several rounds as markdown: arguments are then those of scripts/bench_peers.py.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# One folder an MPI: mpi4py binds to the one it finds beside it.
make_mpi() {
  local folder="$ROOT/build/venv-$1"
  if [[ -x "$folder/bin/mpiexec" ]] && "$folder/bin/python" -c 'import mpi4py, numpy' 2>/dev/null; then return; fi
  say "installing $1 with mpi4py into build/venv-$1"
  "$PYTHON" -m venv --clear "$folder"
  "$folder/bin/python" -m pip install --quiet "$1" mpi4py numpy || fail "pip could not install $1, mpi4py and numpy"
}

mpi=no
arguments=()
for argument in "$@"; do
  if [[ "$argument" == --mpi ]]; then mpi=yes; else arguments+=("$argument"); fi
done

if [[ $mpi == yes ]]; then
  make_mpi mpich
  make_mpi openmpi
fi
for ranks in ${RANKS:-2 4}; do
  say "$ranks ranks"
  if [[ $mpi == yes ]]; then
    "$PYTHON" "$ROOT/scripts/bench_peers.py" --ranks "$ranks" "${arguments[@]}"
  else
    torchrun --standalone --nproc-per-node "$ranks" -m hxcomm.bench --compare gloo "${arguments[@]}"
  fi
done
