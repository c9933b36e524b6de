"""What importing costs: the library stays light, the command's help stays instant."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "aiohttp", "pyarrow", "datasets", "numpy", "vllm")


@pytest.mark.parametrize(
    "module", ["asap", "asap_runtime.pipeline", "asap_anchor", "asap_surprisal", "asap_cli.main"]
)
def test_importing_stays_light(module):
    code = f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert loaded == []
