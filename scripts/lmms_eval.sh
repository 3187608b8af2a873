#!/usr/bin/env bash
# Install lmms-eval (about 1 GB) in an environment of its own, and run the tests of its adapter.
# With --install, no tests.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=build/lmms-eval
python="$folder/bin/python"
if [ ! -f "$folder/.ready" ]; then
  "${PYTHON:-python3}" -m venv "$folder"
  torch=$(grep -E '^torch==' constraints.txt | cut -d';' -f1 | head -1)
  "$python" -m pip install --quiet --constraint constraints.txt "${torch:-torch}" --editable '.[lmms-eval]' pytest
  touch "$folder/.ready"
fi
# A torchvision for CUDA beside a torch for CPUs breaks every image processor of transformers.
"$python" -c 'import torchvision' 2>/dev/null || "$python" -m pip uninstall --quiet --yes torchvision
[ "${1:-}" = --install ] && exit
OMP_NUM_THREADS=1 "$python" -m pytest -p no:cacheprovider tests/integrations/test_lmms_eval.py tests/test_real.py "$@"
