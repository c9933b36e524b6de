"""Requests to one LLM server over HTTP, each bounded in time; trouble comes out as our errors.

The library's errors quote the server's body, which may quote prompt and key, so ours are raised
outside its `except` blocks and carry no trace of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from asap.errors import Misconfigured
from asap_anchor.failures import Failures

__all__ = ["OPENAI_URL", "Answer", "Transport", "host_of"]

OPENAI_URL = "https://api.openai.com/v1"
_CONNECT_S = 10.0
"""A server that does not accept a connection by then is down; a reply may take minutes."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server sent, whatever its status."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Transport:
    """One server: as many connections as there are requests at one time, no thread for any.

    No `base_url` is OpenAI's own. A server without keys takes any `api_key`. `timeout_s` bounds one
    request from connect to the last byte, so a reply that trickles ends too.
    """

    def __init__(
        self, base_url: str | None, api_key: str, *, timeout_s: float, failures: Failures
    ) -> None:
        base_url = (base_url or OPENAI_URL).rstrip("/")
        self._headers = {"Authorization": _authorization(base_url, api_key)}
        self._base_url = urlsplit(base_url)._replace(netloc=host_of(base_url)).geturl()
        self._timeout_s = timeout_s
        self._failures = failures
        # Made with the first request: it wants a running loop.
        self._session: aiohttp.ClientSession | None = None

    async def post(self, path: str, body: Mapping[str, Any]) -> Answer:
        """POST the JSON object; raises Transient when no whole answer came."""
        data = json.dumps(body).encode()
        return await self._send("POST", path, data, {"Content-Type": "application/json"})

    async def get(self, path: str) -> Answer:
        """GET; raises Transient when no whole answer came."""
        return await self._send("GET", path, None, {})

    async def upload(self, path: str, fields: Mapping[str, str], name: str, data: bytes) -> Answer:
        """POST a form with these fields and one `file`; raises Transient as above."""
        form = aiohttp.FormData(dict(fields))
        form.add_field("file", data, filename=name, content_type="application/jsonl")
        return await self._send("POST", path, form, {})

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def _send(
        self,
        method: str,
        path: str,
        data: bytes | aiohttp.FormData | None,
        headers: Mapping[str, str],
    ) -> Answer:
        if self._session is None:
            self._session = self._open()
        url, failure = self._base_url + path, self._failures.unreachable()
        try:
            async with self._session.request(method, url, data=data, headers=headers) as response:
                return Answer(response.status, response.headers, await response.read())
        except TimeoutError:
            failure = self._failures.timed_out(self._timeout_s)
        except (aiohttp.ClientError, OSError):
            pass
        raise failure

    def _open(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            # Slots bound the calls; the library's own pool would only hide that they wait.
            connector=aiohttp.TCPConnector(limit=0),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(
                total=self._timeout_s, connect=min(_CONNECT_S, self._timeout_s)
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            # Found once: the library would look it up, in a thread, before each request.
            proxy=_proxy(self._base_url),
        )


def host_of(base_url: str | None) -> str:
    """Host and port for messages, without a password that the URL may hold.

    Raises Misconfigured for a URL that cannot work.
    """
    try:
        address = urlsplit(base_url or OPENAI_URL)
        works = address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:  # half an IPv6 address, a port beyond 65535
        works = False
    if not works:
        raise Misconfigured(
            "The LLM's base URL must look like http://host:8000/v1 or https://host/v1."
        )
    return address.netloc.rpartition("@")[2]


def _authorization(base_url: str, api_key: str) -> str:
    """The header; a name and password in the URL are for a proxy in front of the server."""
    key = _header_safe(api_key)
    address = urlsplit(base_url)
    if address.username is None:
        return f"Bearer {key}"
    return aiohttp.encode_basic_auth(unquote(address.username), unquote(address.password or ""))


def _header_safe(api_key: str) -> str:
    """The key without the newline that files end in. Refuses what HTTP could not carry.

    The HTTP library would refuse it too, with the key in its message.
    """
    key = api_key.strip()
    if not key or not (key.isascii() and key.isprintable()):
        raise Misconfigured("The LLM's API key must be one line of printable ASCII characters.")
    return key


def _proxy(base_url: str) -> str | None:
    """The proxy that the environment names for this server."""
    address = urlsplit(base_url)
    if proxy_bypass(address.hostname or ""):
        return None
    return getproxies().get(address.scheme)
