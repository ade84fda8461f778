#!/usr/bin/env bash
# Strict mypy over the package as it is installed. The folders export/ and serve/ become prompttune.export and
# prompttune.serve only there, so mypy cannot follow those names in the source tree.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root=$PWD
python=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}")
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT

"$python" scripts/tensorrt_stubs.py
wheel=$(PYTHON=$python scripts/wheel.sh "$wheels")
rm -rf build/typecheck
"$python" -m pip install --quiet --no-deps --no-compile --target build/typecheck "$wheel"
cd build/typecheck
"$python" -m mypy --config-file "$root/pyproject.toml" --cache-dir "$root/.mypy_cache" --package prompttune
