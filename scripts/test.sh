#!/usr/bin/env bash
# Set up and run the tests. Arguments go to pytest; without any, everything runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh demo dev
# shellcheck source=/dev/null
source .venv/bin/activate
export OMP_NUM_THREADS=1
exec python -m pytest --numprocesses 2 --dist loadfile "$@"
