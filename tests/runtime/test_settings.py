from __future__ import annotations

import pytest

from asap.errors import Misconfigured
from asap_anchor.settings import AnchorSettings
from asap_runtime.settings import RuntimeSettings, load_settings, redacted
from asap_surprisal.settings import SurprisalSettings


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    import os

    for name in list(os.environ):
        if name.startswith("ASAP_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_the_laptop_needs_no_setting(tmp_path):
    settings = load_settings(RuntimeSettings, home=tmp_path)
    assert settings.database_url == f"sqlite:///{tmp_path}/asap.db"
    assert settings.queue_url == "memory://"


def test_environment_over_file_over_default(monkeypatch, tmp_path):
    (tmp_path / "asap.toml").write_text('[llm]\nmodel = "from-file"\nconcurrency = 7\n')
    monkeypatch.setenv("ASAP_LLM__MODEL", "from-environment")
    llm = load_settings(AnchorSettings).llm
    assert (llm.model, llm.concurrency, llm.timeout_s) == ("from-environment", 7, 600.0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ASAP_DATABASE__URLL", "did you mean ASAP_DATABASE__URL?"),
        ("ASAP_QUEU__URL", "did you mean ASAP_QUEUE__URL?"),
        ("ASAP_LLM__MODLE", "did you mean ASAP_LLM__MODEL?"),
        ("ASAP_WHATEVER", "unknown setting ASAP_WHATEVER"),
    ],
)
def test_a_typing_error_is_found_at_the_start(monkeypatch, name, words):
    monkeypatch.setenv(name, "x")
    with pytest.raises(Misconfigured) as caught:
        load_settings(AnchorSettings)
    assert words in caught.value.detail


def test_groups_of_other_roles_are_left_alone(monkeypatch):
    monkeypatch.setenv("ASAP_LLM__MODEL", "x")
    monkeypatch.setenv("ASAP_GATEWAY__PORT", "1")
    load_settings(SurprisalSettings)


def test_a_wrong_value_names_its_variable_and_never_shows_it(monkeypatch):
    monkeypatch.setenv("ASAP_SURPRISAL__MAX_BATCH_TOKENS", "secret-like")
    with pytest.raises(Misconfigured, match="ASAP_SURPRISAL__MAX_BATCH_TOKENS: ") as caught:
        load_settings(SurprisalSettings)
    assert "secret-like" not in caught.value.detail


def test_secrets_are_stars(monkeypatch):
    monkeypatch.setenv("ASAP_LLM__API_KEY", "planted")
    monkeypatch.setenv("ASAP_DATABASE__URL", "postgresql+psycopg://user:planted@host/db")
    settings = load_settings(AnchorSettings)
    assert "planted" not in repr(settings) + str(redacted(settings))
    assert settings.database_url.endswith("planted@host/db")
