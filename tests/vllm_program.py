"""What stands for `vllm serve`: the scripted server as a program, with a child as vLLM has its
engine.

Each start appends its process ids, arguments and environment to `starts.jsonl` in its folder. How
it behaves is written in `behaviour.json` of the model's directory:

    exit     end at once with this code
    healthy  false: never
    deaf     true: SIGTERM does nothing
    tokens   of each answer
    gap_s    between them
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from fake_vllm import FakeVllm, Say

CHILD = ["sleep", "600"]
DEAF_CHILD = ["sh", "-c", "trap '' TERM; sleep 600 & wait; wait"]


def program() -> tuple[str, ...]:
    """The command line up to its arguments."""
    return sys.executable, str(Path(__file__))


def starts(folder: Path) -> list[dict]:
    """What was started in the folder, in order."""
    return [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["serve"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    given, _ = parser.parse_known_args()
    written = given.directory / "behaviour.json"
    behaviour = json.loads(written.read_text()) if written.exists() else {}
    if behaviour.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    child = subprocess.Popen(DEAF_CHILD if behaviour.get("deaf") else CHILD)
    facts = {"pids": [os.getpid(), child.pid], "args": sys.argv[1:], "env": dict(os.environ)}
    with Path("starts.jsonl").open("a") as log:
        log.write(json.dumps(facts) + "\n")
    if "exit" in behaviour:
        sys.exit(behaviour["exit"])
    said = Say(*behaviour.get("tokens", ["hello"]), gap_s=behaviour.get("gap_s", 0.0))
    with FakeVllm(
        model=given.served_model_name,
        port=given.port,
        script=[said],
        healthy=behaviour.get("healthy", True),
    ):
        while True:
            signal.pause()


if __name__ == "__main__":
    main()
