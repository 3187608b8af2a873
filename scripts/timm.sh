#!/usr/bin/env bash
# Install timm beside foveate in an environment of its own (about 1 GB), and run the tests that need it.
# With FOVEATE_TIMM=folder the environment there is used as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${FOVEATE_TIMM:-build/timm}
python="$folder/bin/python"
if [ -z "${FOVEATE_TIMM:-}" ] && [ ! -f "$folder/.ready" ]; then
  "${PYTHON:-python3}" -m venv "$folder"
  torch=$(grep -E '^torch==' constraints.txt | cut -d';' -f1 | head -1)
  "$python" -m pip install --quiet --constraint constraints.txt "${torch:-torch}" --editable . hypothesis pytest pytest-timeout pytest-xdist
  # Without what they ask for: torchvision's wheel is for CUDA, and would replace torch.
  "$python" -m pip install --quiet --no-deps 'timm==1.0.31' 'torchvision==0.28.0'
  # torchvision loads beside a torch for CPUs if somebody names its two operators first.
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp scripts/vllm_site.py "$site/sitecustomize.py"
  touch "$folder/.ready"
fi
OMP_NUM_THREADS=1 PYTHONPATH=. "$python" -m pytest -p no:cacheprovider tests/vision/test_timm.py tests/conformance/test_matrix.py -k "timm" "$@"
