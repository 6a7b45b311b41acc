#!/usr/bin/env bash
# Make the virtual environment $VENV and install the package into it, in editable form, at the versions of
# constraints.txt; with PACKAGE=no what it needs alone. Called by `make venv`.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
EXTRAS=${EXTRAS:-dev}

can_make_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

if [[ -x $VENV/bin/python ]]; then
  python=$VENV/bin/python
else
  python=$(.ci/python.sh)
fi

# Debian and Ubuntu ship Python without ensurepip unless python3.X-venv is installed.
if ! can_make_venv "$python"; then
  package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
  if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 install -y -qq "$package"
  else
    echo "make venv: $python cannot make virtual environments; install $package" >&2
    exit 1
  fi
fi

[[ -x $VENV/bin/python ]] || "$python" -m venv --clear "$VENV"
pip=("$VENV/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet --upgrade 'pip>=24' 'setuptools>=77' wheel

# torch first and alone: it is the one package that comes in several builds. Without a GPU the CPU build is taken: from
# pip's own index where that one is such a build, else from PyTorch's; where that cannot be reached, any build runs.
torch=$(grep -o '^torch==[0-9.]*' constraints.txt)
index=()
if [[ -n ${MINITRON_TORCH_INDEX:-} ]]; then
  index=(--index-url "$MINITRON_TORCH_INDEX")
elif ! command -v nvidia-smi >/dev/null; then
  found=$("${pip[@]}" install --quiet --no-deps --dry-run --ignore-installed --report - "$torch" 2>/dev/null |
    "$VENV/bin/python" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])' || true)
  [[ $found == *+cpu ]] || index=(--index-url https://download.pytorch.org/whl/cpu)
fi
echo "make venv: installing $torch into $VENV"
if ! "${pip[@]}" install --quiet "${index[@]}" "$torch"; then
  if ((${#index[@]} == 0)) || [[ -n ${MINITRON_TORCH_INDEX:-} ]]; then exit 1; fi
  echo "make venv: PyTorch's index gives no CPU build, so the build of pip's own index is installed, with its libraries"
  "${pip[@]}" install --quiet "$torch"
fi

echo "make venv: installing minitron_mcore[$EXTRAS] into $VENV"
isolation=()
[[ $EXTRAS != *gpu* ]] || isolation=(--no-build-isolation)
"${pip[@]}" install -qq "${isolation[@]}" --constraint constraints.txt --editable ".[$EXTRAS]"
[[ ${PACKAGE:-yes} != no ]] || "${pip[@]}" uninstall --quiet --yes minitron-mcore
"${pip[@]}" check
