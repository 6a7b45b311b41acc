#!/usr/bin/env bash
# Print the Python for the virtual environment: $PYTHON where it is given. Else, of the supported ones that are found,
# the first for which pip's own index holds a CPU build of torch, since that spares gigabytes of CUDA libraries; where
# it holds one for none of them, or where there is a GPU, the first.
set -euo pipefail
cd "$(dirname "$0")/.."

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
is_supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }

found=() versions=" "
for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13 python3.10}; do
  if is_supported "$candidate" && [[ $versions != *" $(version "$candidate") "* ]]; then
    found+=("$candidate") versions+="$(version "$candidate") "
  fi
done
if ((${#found[@]} == 0)); then
  echo "no Python 3.10 to 3.13 found; install one, or name it: make venv PYTHON=/path/to/python3.12" >&2
  exit 1
fi

has_cpu_build() {  # of torch, for a Python of version $1
  "$asker" install --quiet --dry-run --no-deps --ignore-installed --only-binary=:all: --python-version "$1" \
    --target "$scratch/none" --report - "$(grep -o '^torch==[0-9.]*' constraints.txt)" 2>/dev/null |
    grep -q '"version": "[^"]*+cpu"'
}

if ((${#found[@]} > 1)) && [[ -z ${MINITRON_TORCH_INDEX:-} ]] && ! command -v nvidia-smi >/dev/null; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  asker=$scratch/venv/bin/pip
  for candidate in "${found[@]}"; do
    "$candidate" -m venv "$scratch/venv" >/dev/null 2>&1 && "$asker" install --quiet 'pip>=24' 2>/dev/null && break
  done
  for candidate in "${found[@]}"; do
    if has_cpu_build "$(version "$candidate")"; then
      echo "$candidate"
      exit
    fi
  done
fi
echo "${found[0]}"
