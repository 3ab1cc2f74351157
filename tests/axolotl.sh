#!/usr/bin/env bash
# Tests the axolotl plugin with the real package, in an environment of its own (.venv-axolotl).
# usage: tests/axolotl.sh - with the Python that PYTHON312 names, or one that is found; else skipped
# Of what axolotl depends on only that is installed which `axolotl train` imports, not what is for
# GPUs and clouds. torch comes in its CPU build; where the package index has none for that Python,
# it is the plain one, with 3 GB of CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE PYTHONPATH
torch=${TORCH:-torch==2.13.0}
imported="accelerate addict art axolotl-contribs-lgpl axolotl-contribs-mit bitsandbytes colorama
    datasets einops evaluate fastcore fire numba numpy nvidia-ml-py packaging peft posthog pydantic
    python-dotenv PyYAML requests schedulefree scipy sentencepiece transformers trl typer wandb
    zstandard"

find_python() {
    local candidate
    for candidate in "${PYTHON312:-python3.12}" \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python3.12; do
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

bin=.venv-axolotl/bin
if [ ! -x $bin/pytest ]; then
    python=$(find_python)
    if [ -z "$python" ]; then
        echo "skipped: axolotl needs Python 3.12, and none was found; PYTHON312=PATH names one"
        exit 0
    fi
    "$python" -m venv .venv-axolotl
    install="$bin/pip install --quiet --no-compile"
    $install "$torch+cpu" 2>/dev/null || $install "$torch"
    $install --no-deps axolotl==0.21.0
    $bin/python - $imported > .venv-axolotl/requirements.txt <<'PINNED'
import sys
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for requirement in map(Requirement, requires("axolotl")):
    if requirement.name in sys.argv and "extra" not in str(requirement.marker):
        print(f"{requirement.name}{requirement.specifier}")
PINNED
    $install "$torch" --requirement .venv-axolotl/requirements.txt --editable . pillow
    $install hypothesis pytest
fi
$bin/pip install --quiet --no-deps --editable .
$bin/python -m pytest -p no:cacheprovider tests/test_axolotl.py
