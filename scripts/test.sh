#!/usr/bin/env bash
# Makes the environment, then runs the linter and the tests. Arguments go to pytest:
#
#   scripts/test.sh                       all that CI runs, in two processes
#   scripts/test.sh tests/test_image.py   one file
#   scripts/test.sh -m slow               what takes minutes
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/environment.sh" dev
cd "$root"
ruff check .
ruff format --check --quiet . || { echo "run 'ruff format .'" >&2; exit 1; }
# -rs says what was skipped and why, such as the pages where there is no Chromium.
[ $# -gt 0 ] || set -- -n 2 --dist loadfile -rs
exec python -m pytest -q "$@"
