#!/bin/sh
# Install Unsloth for training on a CPU, into an environment that has this project's extra `trainer`.
#   sh scripts/install_unsloth.sh .venv/bin/python
# On a machine with a GPU Unsloth's own requirements are right: pip install unsloth==2026.10.9
# Runs again in a second when all is there.
set -eu
python=${1:?usage: install_unsloth.sh PYTHON}
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
version=2026.10.9

if "$python" - "$version" 2>/dev/null <<'PY'
import sys
from importlib.metadata import version

needed = {version(name) for name in ("unsloth", "unsloth_zoo")}
version("bitsandbytes"), version("cut_cross_entropy"), version("torchao"), version("tyro")
sys.exit(needed != {sys.argv[1]})
PY
then
  echo "unsloth $version is installed"
  exit 0
fi
"$python" -m pip install --quiet --disable-pip-version-check \
  --constraint "$here/../constraints.txt" --requirement "$here/unsloth.txt"
"$python" -m pip install --quiet --disable-pip-version-check --no-deps \
  --constraint "$here/../constraints.txt" \
  bitsandbytes cut_cross_entropy torchao "unsloth==$version" "unsloth_zoo==$version"
echo "unsloth $version installed"
