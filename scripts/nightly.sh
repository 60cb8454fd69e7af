#!/usr/bin/env bash
# Runs scripts/test.sh and then the tests that it leaves out: those marked slow, and those marked cifar
# where CIFAR10_FOLDER names a folder with CIFAR-10 (README says how it is laid out).
set -euo pipefail
scripts=$(dirname "${BASH_SOURCE[0]}")
status=0
"$scripts/test.sh" || status=1
"$scripts/test.sh" -rs -m "slow${CIFAR10_FOLDER:+ or cifar}" || status=1
exit $status
