"""What users copy is executed: the example of the library, against a scripted server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from openai_server import OpenAIServer, Reply

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_library_example_prunes_its_triples():
    def answer(prompt, body):
        return Reply('{"keep": [1, 2, 3]}' if "numbered steps" in prompt else "The direct CoT.")

    with OpenAIServer(answer) as server:
        ran = subprocess.run(
            [sys.executable, EXAMPLES / "prune_library.py", server.base_url, "scripted"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    lines = ran.stdout.splitlines()
    assert len(lines) == 3
    assert all("compressed" in line and "(0, 1, 2)" in line for line in lines)
