#!/bin/sh
# Install into the virtual environment of an image, with exact versions; takes what pip install takes.
set -eu
exec /opt/venv/bin/python -m pip install --quiet --no-cache-dir --disable-pip-version-check \
  --root-user-action ignore --constraint /build/constraints.txt "$@"
