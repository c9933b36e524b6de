"""Training runs for tests: a run's folder in a blob store, and real training processes on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from asap.runs import TrainRun
from asap.train_config import TrainConfig
from asap_runtime.blobs import BlobStore
from asap_runtime.run_files import RunFiles

TINY = {
    "preset": "demo",
    "max_seq_length": 256,
    "max_steps": 30,
    "log_every": 1,
    "save_every": 10,
    "accumulation": 2,
    "learning_rate": 3e-3,
}
"""Of the demo preset: float32 on the CPU."""


def triples(count: int = 16) -> list[dict[str, str]]:
    return [
        {
            "id": f"s{n}",
            "question": f"What is {n} plus {n}?",
            "cot": "Okay, so I need the sum of the two numbers.\n\n" * (1 + n % 3),
            "answer": f"So x is {2 * n}.",
        }
        for n in range(count)
    ]


@dataclass(frozen=True)
class Run:
    """A run, its files, and the home of its processes."""

    spec: TrainRun
    files: RunFiles
    home: Path

    @property
    def folder(self) -> Path:
        return self.home / "blobs" / self.spec.prefix

    def json(self, name: str) -> Any:
        return json.loads(self.files.read(name))

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.files.read("metrics.jsonl").splitlines()]

    def start(self, *options: str, code: Sequence[str] = ("-m", "asap_trainer.train")) -> Any:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ASAP_")},
            "ASAP_HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        return subprocess.Popen(
            [sys.executable, *code, "--run", self.spec.prefix, *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def carry_out(self, *options: str, **how: Any) -> subprocess.CompletedProcess[str]:
        """Run to the end; what it printed is shown when a test fails."""
        process = self.start(*options, **how)
        out, errors = process.communicate(timeout=300)
        sys.stderr.write(errors[-4000:])
        return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


STORED_FIRST = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import stored_first
"""


def signals_itself(name: str, number: int, *, stored: bool) -> list[str]:
    """The training command that gets a signal when a file of its run is, or would be, stored."""
    code = f"""{STORED_FIRST}
import os
from asap_runtime.run_files import RunFiles
write = RunFiles.write
def writes(self, name, data):
    if {stored} or name != {name!r}:
        write(self, name, data)
    if name == {name!r}:
        os.kill(os.getpid(), {int(number)})
RunFiles.write = writes
from asap_trainer.train import main
sys.exit(main(sys.argv[1:]))
"""
    return ["-c", code]


def stands_still(folder: Path) -> Path:
    """An interpreter for training processes. They stand still, when a checkpoint has been handed to
    the store, until there is a file `go` in the folder, or until they are told to end.
    """
    folder.mkdir()
    (folder / "train.py").write_text(f"""
import pathlib, sys, time
from asap_trainer import train
from asap_trainer.checkpoints import Checkpoints
go = pathlib.Path({str(folder / "go")!r})
begin, store, stops = train._Process.__init__, Checkpoints.store, []
def begins(process, *arguments):
    stops.append(arguments[-1])
    begin(process, *arguments)
def stores(self, *checkpoint):
    store(self, *checkpoint)
    while not (go.exists() or stops[0].is_set()):
        time.sleep(0.02)
train._Process.__init__, Checkpoints.store = begins, stores
sys.exit(train.main(sys.argv[3:]))
""")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {folder / "train.py"} "$@"\n')
    python.chmod(0o755)
    return python


def make_run(
    home: Path, base: Path, rows: list[dict[str, Any]] | None = None, **config: Any
) -> Run:
    """A run that is ready to be carried out."""
    spec = TrainRun(
        id=uuid4().hex,
        tenant="acme",
        config=TrainConfig.model_validate({**TINY, **config}),
        base=str(base),
        model="tiny",
        data="",
    )
    files = RunFiles(BlobStore.in_folder(home / "blobs"), spec.prefix)
    lines = "".join(f"{json.dumps(row)}\n" for row in rows or triples())
    files.write("data.jsonl", lines.encode())
    spec = spec.grown(data=f"{spec.prefix}/data.jsonl")
    files.write("spec.json", spec.model_dump_json().encode())
    return Run(spec, files, home)
