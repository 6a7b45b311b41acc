#!/usr/bin/env bash
# The tests that touch megatron-core, under another supported pair of Python and megatron-core than $VENV's.
#
#   .ci/matrix.sh python            print the interpreter of that pair; nothing where none is installed
#   .ci/matrix.sh make              the same, made first where a Python 3.13 or 3.12 is found
#   .ci/matrix.sh quick|full ...    run that selection with it (further pytest arguments); says so where none is installed
#
# $MINITRON_MATRIX_PYTHON names an environment's interpreter; else one is made, once for all clones, in
# ~/.cache/minitron_mcore. It holds what the package needs and not the package, which is this folder's.
set -euo pipefail
cd "$(dirname "$0")/.."

ENVIRONMENT=${XDG_CACHE_HOME:-$HOME/.cache}/minitron_mcore/megatron-0.19
QUICK=(tests/unit/checkpoint/test_{unpickle,versions}.py tests/unit/training/test_budget.py
  tests/distributed/training/test_{repairs,training,resume}.py
  tests/distributed/checkpoint/test_{full_disk,other_versions,foreign,stream}.py)
FULL=(tests/unit tests/distributed)

installed() {
  local python lacking
  for python in "${MINITRON_MATRIX_PYTHON:-}" "$ENVIRONMENT/bin/python"; do
    command -v "$python" >/dev/null || continue
    if lacking=$("$python" .ci/lacking.py 2>&1) && [[ -z $lacking ]]; then echo "$python" && return; fi
    echo "$python lacks ${lacking##*$'\n'}: make test-matrix installs it in $ENVIRONMENT" >&2
  done
}

newer_python() {  # one that megatron-core 0.19 has wheels for
  local candidate
  for candidate in python3.13 python3.12 python3 "$HOME"/.pyenv/versions/3.1[32].*/bin/python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
    then echo "$candidate" && return; fi
  done
}

make_environment() {
  local base
  base=$(newer_python)
  if [[ -z $base ]]; then
    echo "make test-matrix: no Python 3.12 or 3.13 found, so this pair is left out" >&2
    return
  fi
  VENV=$ENVIRONMENT PYTHON=$base PACKAGE=no .ci/venv.sh >&2
}

run() {
  local python
  python=$(installed)
  if [[ -z $python ]]; then
    echo "megatron-core 0.19 under Python 3.12 or 3.13 is not installed here, and not tested (make test-matrix)"
    return
  fi
  "$python" -c 'import sys, torch; from importlib.metadata import version
print(f"Python {sys.version.split()[0]}, megatron-core {version('"'"'megatron-core'"'"')}, torch {torch.__version__}")'
  PYTHONPATH=$PWD OMP_NUM_THREADS=1 "$python" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
}

case ${1:-} in
  python) installed ;;
  make) [[ -n $(installed) ]] || make_environment; installed ;;
  quick) run "${QUICK[@]}" "${@:2}" ;;
  full) run "${FULL[@]}" "${@:2}" ;;
  *) echo "usage: .ci/matrix.sh python|make|quick|full [pytest arguments]" >&2; exit 2 ;;
esac
