from __future__ import annotations

import json
import os

import pytest

from asap_cli.serve import is_loopback


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("ASAP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ASAP_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_loopback_is_told_by_the_address(host, loopback):
    assert is_loopback(host) == loopback


@pytest.mark.parametrize("command", ["serve", "gateway"])
def test_an_open_address_without_keys_is_refused(asap, command):
    ran = asap(command, "--host", "0.0.0.0")
    assert ran.code == 78
    assert "no API keys" in ran.err


def test_config_shows_the_effective_values_and_no_secret(asap, monkeypatch):
    monkeypatch.setenv("ASAP_LLM__API_KEY", "planted")
    monkeypatch.setenv("ASAP_SURPRISAL__MODEL", "mine")
    settings = json.loads(asap("config").out)
    assert settings["surprisal"]["model"] == "mine"
    assert settings["llm"]["api_key"] == "**********"


def test_a_typing_error_in_a_setting_ends_with_78(asap, monkeypatch):
    monkeypatch.setenv("ASAP_LLM__MODLE", "x")
    ran = asap("config")
    assert (ran.code, ran.err) == (
        78, "asap: unknown setting ASAP_LLM__MODLE; did you mean ASAP_LLM__MODEL?\n"
    )  # fmt: skip


def test_db_upgrade_makes_the_database_twice_in_a_row(asap, tmp_path):
    for _ in range(2):
        assert asap("db", "upgrade").code == 0
    assert (tmp_path / "home" / "asap.db").stat().st_size > 0


def test_an_unknown_stage_is_named(asap):
    ran = asap("worker", "training")
    assert ran.code == 65
    assert "anchor, surprisal, trainer, generate, grade" in ran.err
