from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from asap_cli.main import main


@dataclass(frozen=True)
class Ran:
    """What a command left: its exit code and both streams."""

    code: int
    out: str
    err: str


@pytest.fixture
def asap(monkeypatch, capsys):
    """Run `asap ARGS` in this process."""

    def run(*args: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["asap", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        code = stopped.value.code
        return Ran(0 if code is None else int(code), out, err)

    return run


@pytest.fixture
def samples(tmp_path) -> Path:
    """Six of the shipped triples."""
    lines = (Path(__file__).parents[2] / "examples" / "triples.jsonl").read_text().splitlines()
    path = tmp_path / "in.jsonl"
    short = sorted(lines, key=len)[:6]
    path.write_text("\n".join(short) + "\n")
    return path
