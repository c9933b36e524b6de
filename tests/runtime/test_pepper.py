from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from asap.errors import Misconfigured
from asap_runtime.pepper import AuthSettings, KeySettings, load_pepper
from asap_runtime.settings import load_settings, redacted

UNSET = AuthSettings()


def test_the_file_is_made_once_for_its_owner_alone(tmp_path):
    home = tmp_path / "new" / "home"
    pepper = load_pepper(UNSET, home)
    assert len(pepper) == 64
    assert load_pepper(UNSET, home) == pepper
    assert stat.S_IMODE((home / "pepper").stat().st_mode) == 0o600
    assert [path.name for path in home.iterdir()] == ["pepper"]
    assert load_pepper(UNSET, tmp_path / "another") != pepper


def test_of_many_that_make_it_at_once_one_does(tmp_path):
    for attempt in range(20):
        home = tmp_path / str(attempt)
        with ThreadPoolExecutor(8) as pool:
            peppers = set(pool.map(lambda _, home=home: load_pepper(UNSET, home), range(8)))
        assert len(peppers) == 1
        assert [path.name for path in home.iterdir()] == ["pepper"]


def test_the_setting_goes_before_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASAP_AUTH__PEPPER", "planted planted planted")
    settings = load_settings(KeySettings)
    assert load_pepper(settings.auth, tmp_path) == b"planted planted planted"
    assert not (tmp_path / "pepper").exists()
    assert "planted" not in repr(settings) + str(redacted(settings))


def test_a_short_pepper_is_refused_without_being_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASAP_AUTH__PEPPER", "planted")
    with pytest.raises(Misconfigured, match="ASAP_AUTH__PEPPER") as caught:
        load_settings(KeySettings)
    assert "planted" not in caught.value.detail


@pytest.mark.parametrize("content", ["", "short"])
def test_a_file_without_a_pepper_is_refused(tmp_path, content):
    (tmp_path / "pepper").write_text(content)
    with pytest.raises(Misconfigured, match="less than 16"):
        load_pepper(UNSET, tmp_path)


def test_a_home_that_cannot_be_used_names_the_setting(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Misconfigured, match="ASAP_AUTH__PEPPER"):
        load_pepper(UNSET, tmp_path / "file" / "home")


def test_the_groups_of_other_roles_may_stand_in_the_same_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asap.toml").write_text(
        '[surprisal]\nmodel = "x"\n[auth]\npepper = "abcdefghijklmnop"'
    )
    assert load_pepper(load_settings(KeySettings).auth, tmp_path) == b"abcdefghijklmnop"
