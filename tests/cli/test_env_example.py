from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import BaseModel

from asap_cli.env_example import env_example
from asap_cli.roles import AllSettings
from asap_runtime.settings import load_settings

FILE = Path(__file__).parents[2] / ".env.example"


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("ASAP_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def variables():
    """Each variable of the sample with its value."""
    return dict(re.findall(r"^#(ASAP_\w+)=(.*)$", env_example(), re.MULTILINE))


def test_the_file_of_the_repository_is_the_newest(asap):
    ran = asap("config", "--example")
    assert ran.code == 0
    assert FILE.read_text() == ran.out, "run `asap config --example > .env.example`"


def leaves_of(group, prefix):
    for name in type(group).model_fields:
        value = getattr(group, name)
        if isinstance(value, BaseModel):
            yield from leaves_of(value, f"{prefix}{name.upper()}__")
        else:
            yield f"{prefix}{name.upper()}"


def test_every_setting_is_there_once():
    names = re.findall(r"^#(ASAP_\w+)=", env_example(), re.MULTILINE)
    assert len(names) == len(set(names))
    leaves = {"ASAP_SERVER", "ASAP_API_KEY", *leaves_of(AllSettings(), "ASAP_")}
    assert set(names) == leaves


def test_its_values_are_the_defaults(monkeypatch):
    defaults = AllSettings()
    given = {name: value for name, value in variables().items() if value}
    assert len(given) > 30
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert load_settings(AllSettings) == defaults


def test_each_setting_is_explained_and_copying_changes_nothing():
    lines = env_example().splitlines()
    assert all(not line or line.startswith("#") for line in lines)
    assert max(len(line) for line in lines if line.startswith("# ")) <= 100
    for above, line in pairwise(lines):
        if line.startswith("#ASAP_"):
            assert above.startswith(("# ", "#ASAP_SERVER")), line


def test_type_bounds_and_words_of_a_setting():
    assert (
        "# number, at least 0, at most 1. Of a file's lines; beyond either the job is rejected.\n"
        "#ASAP_GATEWAY__MAX_BAD_SHARE=0.1\n"
    ) in env_example()
    assert "# auto or cpu or cuda.\n#ASAP_SURPRISAL__DEVICE=auto\n" in env_example()
