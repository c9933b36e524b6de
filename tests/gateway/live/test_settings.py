from __future__ import annotations

import pytest

from asap.errors import AsapError, Misconfigured
from asap_gateway.live.settings import ServingSettings
from asap_gateway.settings import GatewaySettings
from asap_runtime.settings import load_settings, redacted


def test_endpoints_and_shadows_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASAP_SERVING__ENDPOINTS", '{"m": ["http://a:1", "http://b:2"]}')
    monkeypatch.setenv("ASAP_SERVING__SHADOW", '{"m": {"baseline": "n", "share": 0.5}}')
    monkeypatch.setenv("ASAP_SERVING__API_KEY", "planted")
    settings = load_settings(GatewaySettings)
    assert settings.serving.endpoints == {"m": ("http://a:1", "http://b:2")}
    assert settings.serving.shadow["m"].baseline == "n"
    assert "planted" not in str(redacted(settings))


@pytest.mark.parametrize("endpoints", ['{"m": []}', '{"m": ["a:1"]}', '{"m": ["http://a/v1"]}'])
def test_an_endpoint_that_cannot_work_is_found_at_the_start(monkeypatch, tmp_path, endpoints):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASAP_SERVING__ENDPOINTS", endpoints)
    with pytest.raises((Misconfigured, AsapError)):
        load_settings(GatewaySettings)


def test_the_limits_are_those_of_the_contract():
    limits = ServingSettings()
    assert (limits.connect_s, limits.first_byte_s, limits.gap_s, limits.total_s) == (
        2,
        120,
        60,
        900,
    )
    assert limits.streams_per_key == 64
