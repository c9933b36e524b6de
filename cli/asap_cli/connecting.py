"""The way to a server: its address, the API key that goes there, and no proxy on this machine."""

from __future__ import annotations

from collections.abc import Generator

import httpx

from asap.errors import InvalidInput

__all__ = ["connect"]

CONNECT_S = 10.0
SILENCE_S = 60.0
"""Longest wait for anything to come."""
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
_DIRECT: dict[str, httpx.BaseTransport | None] = {
    f"all://{f'[{host}]' if ':' in host else host}": None for host in THIS_MACHINE
}
"""No proxy of the environment stands between this machine and itself."""


class _Bearer(httpx.Auth):
    """Sends the key; goes before a user in the URL. Redirects are not followed with it."""

    def __init__(self, key: str) -> None:
        self._key = key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = f"Bearer {self._key}"
        yield request


def connect(server: str, key: str | None = None) -> httpx.Client:
    """An HTTP client of the server at this URL, which it asks for nothing yet.

    Args:
        server: http or https.
        key: an API key. Over plain http it goes to this machine only.

    Raises InvalidInput, and never with the key in it.
    """
    try:
        url = httpx.URL(server)
        url.raw_host.decode().encode("idna")  # what connecting does, without a word to users
    except (httpx.InvalidURL, UnicodeError):
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise InvalidInput(
            f"the server must be a URL such as http://127.0.0.1:8000, not {server!r}"
        )
    key = (key or "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InvalidInput("ASAP_API_KEY holds no API key: one has letters, digits and _ only")
    if key and url.scheme == "http" and url.host not in THIS_MACHINE:
        raise InvalidInput(
            f"an API key goes over https only, and the server is http://{url.host}; name it with "
            "https, or unset ASAP_API_KEY"
        )
    return httpx.Client(
        base_url=url,
        auth=_Bearer(key) if key else None,
        timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S),
        mounts=_DIRECT,
        follow_redirects=False,
    )
