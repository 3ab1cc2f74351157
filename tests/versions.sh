#!/usr/bin/env bash
# Tests models, templates, masks and trainers with each version that flexmask claims to run with.
# usage: tests/versions.sh [REQUIREMENT...], such as "transformers==5.12.*" - all of them by default
# One environment takes them in turn. torch comes in its CPU build; where the package index has
# none (another index: PIP_EXTRA_INDEX_URL), that version is skipped and said to be.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE PYTHONPATH
torch=${TORCH:-torch==2.13.0}
[ "$(uname -sm)" = "Linux x86_64" ] && build=+cpu || build=  # elsewhere plain builds are for CPUs
[ $# -gt 0 ] || set -- 'transformers==5.12.*' 'transformers==5.17.*' transformers \
    "torch==2.11.0$build" "torch==2.13.0$build" "torch==2.14.0$build"

bin=.venv-versions/bin
[ -x $bin/pip ] || "${PYTHON:-python3}" -m venv .venv-versions
install="$bin/pip install --quiet --no-compile --upgrade"
results=()
for requirement in "$@"; do
    both=("$requirement")
    [[ $requirement == torch=* ]] || both+=("$torch")
    if ! $install --no-deps --dry-run "${both[@]}"; then
        results+=("$requirement: skipped, the package index does not have it")
        continue
    fi
    $install "${both[@]}" --editable '.[dev]'
    $bin/pip list 2>/dev/null | grep -E '^(torch|transformers|trl|peft|accelerate) '
    $bin/python -m pytest --numprocesses "${WORKERS:-2}" --dist worksteal -p no:cacheprovider \
        tests/test_model*.py tests/test_hybrid_families.py tests/test_templates.py \
        tests/test_mask.py tests/test_backends.py tests/test_varlen_backend.py \
        tests/test_trainers.py tests/test_sequence_*.py && result=passed || result=FAILED
    results+=("$requirement: $result")
done
printf '%s\n' "${results[@]}"
[[ "${results[*]}" != *FAILED* ]]
