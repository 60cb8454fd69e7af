#!/usr/bin/env bash
# Creates the environment, then runs the linters, the type checker and the tests. Arguments go to pytest:
#
#   scripts/test.sh                              everything that CI runs, in two processes
#   scripts/test.sh tests/data/test_images.py    one file
#   scripts/test.sh -m slow                      the tests that take minutes
#
# scripts/nightly.sh runs all of them.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/environment.sh" dev
cd "$root"
ruff check .
ruff format --check --quiet . || { echo "run 'ruff format .'" >&2; exit 1; }
lint-imports --no-cache --no-logo
mypy
# -rs says which tests were skipped and why, such as those of pages where there is no Chromium.
# A test that hangs for 10 minutes ends its process, with the stacks of all threads, and the run fails.
# Files run in their order: the default begins with those of many tests, and a long test would run last and alone.
[ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder -rs \
  --max-worker-restart 0 -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true
exec python -m pytest -q "$@"
