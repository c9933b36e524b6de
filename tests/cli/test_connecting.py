from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from asap.errors import InvalidInput
from asap_cli.connecting import connect


@pytest.fixture
def heard():
    """A server's URL, and the headers of what it has been asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(dict(self.headers))
            self.send_response(307)
            self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()

        def log_message(self, *_):
            pass

    requests = []
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_port}", requests
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("user", "key", "authorization"),
    [
        ("", "asap_1_2", "Bearer asap_1_2"),
        ("", " asap_1_2\n", "Bearer asap_1_2"),
        ("me:word@", "asap_1_2", "Bearer asap_1_2"),
        ("", "", None),
        ("", None, None),
        ("me:word@", None, "Basic bWU6d29yZA=="),
    ],
)
def test_the_key_goes_to_the_server_and_follows_no_redirect(heard, user, key, authorization):
    address, requests = heard
    with connect(f"http://{user}{address}", key) as http:
        assert http.get("jobs").status_code == 307
    assert [headers.get("Authorization") for headers in requests] == [authorization]


def test_no_proxy_hears_what_this_machine_tells_itself(heard, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    address, requests = heard
    with connect(f"http://{address}", "asap_1_2") as http:
        http.get("jobs")
    assert len(requests) == 1


@pytest.mark.parametrize(
    "server", ["http://example.org", "http://10.0.0.1:8000", "http://localhost.example.org", "http://[::2]"]
)  # fmt: skip
def test_over_plain_http_no_key_goes_to_another_machine(server):
    with pytest.raises(InvalidInput, match="goes over https only") as raised:
        connect(server, "asap_1_2")
    assert "asap_1_2" not in raised.value.detail
    connect(server).close()
    connect(server.replace("http:", "https:"), "asap_1_2").close()


@pytest.mark.parametrize("server", ["http://localhost:8000", "http://127.0.0.1", "http://[::1]:1"])
def test_this_machine_may_hear_the_key(server):
    with connect(server, "asap_1_2") as http:
        assert str(http.base_url).startswith(server)


@pytest.mark.parametrize("key", ["two words", "two\nlines", "schlüssel"])
def test_what_cannot_be_a_key_is_refused_and_not_shown(key):
    with pytest.raises(InvalidInput, match="ASAP_API_KEY") as raised:
        connect("http://127.0.0.1:8000", key)
    assert key not in raised.value.detail


@pytest.mark.parametrize(
    "server", ["", "localhost:8000", "ftp://x", "http://", "http://x:port", "http://x..y", "x y"]
)
def test_a_server_must_be_a_url(server):
    with pytest.raises(InvalidInput, match="must be a URL"):
        connect(server)
