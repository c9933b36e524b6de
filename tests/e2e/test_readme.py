"""The commands and the Python of the README are run, or at least compiled."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)


def test_the_quick_start_of_the_command_line_runs(tmp_path):
    [block] = [text for _, text in BLOCKS if "asap rebudget" in text]
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    for line in block.strip().splitlines():
        command = shlex.split(line)
        assert command[0] == ".venv/bin/asap"
        subprocess.run(
            [sys.executable, "-m", "asap_cli.main", *command[1:]], cwd=tmp_path, check=True,
            capture_output=True,
        )  # fmt: skip
    assert (tmp_path / "smaller.jsonl").stat().st_size > 0


@pytest.mark.parametrize("code", [text for language, text in BLOCKS if language == "python"])
def test_python_compiles_and_its_names_exist(code):
    for line in re.findall(r"^from .*", code, re.MULTILINE):
        exec(line, {})
    compile(code, "README.md", "exec")


def test_links_lead_to_files():
    for document in (
        "README.md",
        "docs/cli.md",
        "docs/concepts.md",
        "docs/api.md",
        "docs/training.md",
        "docs/serving.md",
        "docs/images.md",
        "docs/operations.md",
        "gateway/README.md",
    ):
        text = (REPOSITORY / document).read_text()
        for target in re.findall(r"\]\(([^)#]+)", text):
            assert ((REPOSITORY / document).parent / target).exists(), target


def test_make_targets_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    readme = (REPOSITORY / "README.md").read_text()
    for target in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", readme, re.MULTILINE):
        target = "".join(target)
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
