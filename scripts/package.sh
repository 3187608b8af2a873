#!/usr/bin/env bash
# Build wheel and sdist into dist/, and try them in an empty environment away from the repository.
#   scripts/package.sh       # NO_TRY=1 builds only
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-.venv/bin/python}
rm -rf dist
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The source distribution from the tree, and the wheel from that: so it holds what a wheel needs.
"$python" -m venv "$work/build"
"$work/build/bin/python" -m pip install --quiet --disable-pip-version-check build
"$work/build/bin/python" -m build --outdir dist . > "$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
[ -n "${NO_TRY:-}" ] && exit

"$python" -m venv "$work/env"
pip=("$work/env/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$root/constraints.txt")
"${pip[@]}" torch
"${pip[@]}" "$root"/dist/*.tar.gz
"$work/env/bin/foveate" --version
"${pip[@]}" --force-reinstall --no-deps "$root"/dist/*.whl
cd "$work"
unset PYTHONPATH
export PATH="$work/env/bin:$PATH"
python -c "import foveate; assert foveate.__file__.startswith('$work/env'), foveate.__file__"
foveate env > /dev/null
foveate list > /dev/null
foveate list --families > /dev/null
foveate list --model tiny > /dev/null
foveate cite pyramiddrop > /dev/null
foveate demo --quick --repeats 1 > /dev/null
test -s demo-kept.png
# A method of one's own, as docs/add-a-method.md shows it: a file, and what checks it.
for block in 1:my_method 2:check; do
  awk -v wanted="${block%%:*}" '/^```python/ {n++; inside = 1; next} /^```/ {inside = 0} inside && n == wanted' \
    "$root/docs/add-a-method.md" > "${block#*:}.py"
done
grep -q register my_method.py
python check.py
