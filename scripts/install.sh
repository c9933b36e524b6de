#!/bin/sh
# Make a virtual environment and install this project into it, editable, with exact versions.
#   sh scripts/install.sh VENV EXTRAS        e.g. sh scripts/install.sh .venv surprisal
# Needs Python 3.11 or later. Where the system's Python lacks the venv module (Debian splits it off) and we
# are root, it is installed; otherwise the command to do so is printed.
set -eu
venv=$1 extras=$2

find_python() {
  for name in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
    if command -v "$name" >/dev/null 2>&1 &&
      "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "Python 3.11 or later is needed; set PYTHON to its name" >&2
  exit 1
}

if ! [ -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  rm -rf "$venv"
  if ! "$python" -m venv "$venv" >/dev/null 2>&1; then
    rm -rf "$venv"
    package=$("$python" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
      echo "$python has no venv module; install it first: sudo apt-get install $package" >&2
      exit 1
    fi
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "$package"
    "$python" -m venv "$venv"
  fi
fi
# pip, not a faster resolver: it takes the CPU build of torch where the machine offers one
exec "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  --constraint constraints.txt --editable ".[$extras]"
