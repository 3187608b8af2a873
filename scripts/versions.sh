#!/usr/bin/env bash
# Run the tests of the engine and of every family against other versions of transformers.
#   scripts/versions.sh [VERSION ...]
set -euo pipefail
cd "$(dirname "$0")/.."
make --quiet .venv/.ready
if [ $# -eq 0 ]; then set -- 5.18.0 5.20.0 5.21.1 5.22.2 5.24.0; fi
for version in "$@"; do
  folder="build/transformers-$version"
  [ -d "$folder" ] || .venv/bin/python -m pip install --quiet --no-deps --target "$folder" "transformers==$version"
  echo "transformers $version"
  PYTHONPATH="$folder" OMP_NUM_THREADS=1 .venv/bin/python -m pytest --quiet --numprocesses 2 -p no:cacheprovider \
    tests/engine tests/golden tests/conformance tests/vision
done
