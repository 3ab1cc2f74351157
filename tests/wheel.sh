#!/usr/bin/env bash
# Builds the wheel, installs it away from the repository, and runs its commands there.
# usage: tests/wheel.sh PYTHON - whose torch and transformers serve, for a new copy takes minutes
set -euo pipefail
python=$(realpath --no-symlinks "$1")
root=$(realpath "$(dirname "$0")/..")
folder=$(mktemp --directory)
trap 'rm -r "$folder"' EXIT
unset PYTHONPATH
export OMP_NUM_THREADS=1

"$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$root"
"$python" -m venv --without-pip "$folder/venv"
"$python" -m pip --python "$folder/venv/bin/python" install --quiet --no-deps "$folder"/*.whl
cd "$folder"
# A path in a .pth file is looked at last, and the .pth files in it, an editable flexmask, are not.
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    > "$(venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/others.pth"

venv/bin/python - "$root" <<'CHECK'
import importlib.util, sys
from pathlib import Path

for name, source in {"flexmask": "flexmask", "flexmask_kernels": "kernels/flexmask_kernels"}.items():
    installed = Path(importlib.util.find_spec(name).origin).parent
    if Path(sys.prefix) not in installed.parents:
        sys.exit(f"{name} is imported from {installed}, not from the wheel")
    files = (path for path in Path(sys.argv[1], source).rglob("*") if path.is_file())
    names = {path.relative_to(Path(sys.argv[1], source)) for path in files if path.suffix != ".pyc"}
    if missing := [str(name) for name in sorted(names) if not (installed / name).exists()]:
        sys.exit(f"the wheel lacks of {name}: {', '.join(missing)}")
CHECK
venv/bin/flexmask --help
venv/bin/flexmask show
head --lines 4 venv/lib/python*/site-packages/flexmask/demo/assets/tutoring.jsonl > few.jsonl
venv/bin/flexmask demo few.jsonl --steps 1 --batch_size 1
echo "the wheel works away from the repository"
