"""Webhooks: which address may be called, and one signed request that cannot be led elsewhere.

The operator's list names the hosts. A name is resolved once, each of its addresses must be a public
one, and the connection goes to an address that was checked, with TLS for the name. No redirect, no
proxy, nothing of the answer but its status; the path of a URL may hold a secret and is never shown.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address, ip_network
from typing import Literal, Self

import httpx
from pydantic import Field, SecretStr, field_validator, model_validator

from asap.errors import InvalidInput
from asap_runtime.settings import Group

__all__ = ["Answer", "WebhookCaller", "WebhookSettings", "check_url", "is_public", "signature"]

TIMEOUT_S = 5.0
"""From the look-up of the name to the status of the answer."""
CONNECT_S = 2.0
"""For one address; the next one of the same name must get its turn."""
LONGEST_URL = 2048
RESOLVERS = 4
"""Threads of our own: a name server that hangs must not take those of the process."""

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*(?::(?P<port>[1-9][0-9]{{0,4}}))?")
# One pattern for the whole URL, narrower than any parser: two of them cannot read it differently.
# Printable ASCII without backslash and fragment; no user, because of the host's characters.
_URL = re.compile(
    r"https://(?P<place>[a-z0-9.-]+(?::[0-9]{1,5})?)(?:[/?][!\"$-\[\]-~]*)?",
    re.IGNORECASE | re.ASCII,
)

_NAT64 = ip_network("64:ff9b::/96")
_UNICAST = ip_network("2000::/3")
# What `ipaddress` takes for global in one of our versions of Python, or what only looks public.
_NOT_PUBLIC = tuple(
    ip_network(network)
    for network in (
        "168.63.129.16/32",  # the platform's own server in every machine of a large cloud
        "192.0.0.0/24",  # protocol assignments; one cloud has its metadata there
        "192.88.99.0/24",  # relays of 6to4
        "2001::/23",  # protocol assignments, with Teredo: an IPv4 address inside
        "2002::/16",  # 6to4: an IPv4 address inside
        "3fff::/20",  # documentation
    )
)

Resolve = Callable[[str, int], Sequence[str]]


class WebhookSettings(Group):
    """Who may be told of the end of a job."""

    hosts: tuple[str, ...] = ()
    """HOST or HOST:PORT of each https receiver; empty: webhooks are refused."""
    secret: SecretStr | None = Field(None, min_length=32)
    """Key of the signatures, known to the receivers."""

    @field_validator("hosts")
    @classmethod
    def _are_names(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        names = tuple(host.lower() for host in hosts)
        for name in names:
            match = _HOST.fullmatch(name)
            if match is None or int(match["port"] or 443) > 65535:
                raise ValueError("expected HOST or HOST:PORT, without scheme and path")
        return tuple(name.removesuffix(":443") for name in names)

    @model_validator(mode="after")
    def _can_sign(self) -> Self:
        if self.hosts and self.secret is None:
            raise ValueError("hosts are given, so a secret is needed to sign what they get")
        return self


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one call, and a few words on why: a status, or what came in its place."""

    kind: Literal["delivered", "stopped", "refused", "failed"]
    reason: str

    @classmethod
    def of_status(cls, status: int) -> Self:
        """2xx: delivered. 410: the receiver wants no more. All others may be tried again."""
        if 200 <= status < 300:
            return cls("delivered", str(status))
        return cls("stopped" if status == 410 else "failed", str(status))


def check_url(url: str, settings: WebhookSettings) -> None:
    """Raise InvalidInput unless the URL may be called. Looks nothing up."""
    if not settings.hosts:
        raise _refused("this server calls no webhooks; its operator has to list the hosts")
    match = _URL.fullmatch(url) if len(url) <= LONGEST_URL else None
    if match is None:
        raise _refused(
            "expected https://HOST[:PORT]/… in printable ASCII, without user and fragment, "
            f"at most {LONGEST_URL:,} characters"
        )
    if match["place"].lower().removesuffix(":443") not in settings.hosts:
        raise _refused("this host and port are not on the operator's list")


def _refused(detail: str) -> InvalidInput:
    errors = [{"pointer": "/webhook", "detail": detail}]
    return InvalidInput(f"/webhook: {detail}", errors=errors)


def is_public(address: str) -> bool:
    """Whether the address belongs to the public internet, whatever wraps it.

    Not private, loopback, link-local, shared (100.64.0.0/10), unique local, multicast, unspecified
    or reserved; no IPv4 address inside an IPv6 one but that of NAT64, which is itself checked.
    """
    ip = ip_address(address)
    if ip in _NAT64:
        ip = IPv4Address(int(ip) & 0xFFFFFFFF)
    if ip.version == 6 and ip not in _UNICAST:
        return False
    looks_public = ip.is_global and not ip.is_multicast and not ip.is_reserved
    return looks_public and not any(ip in network for network in _NOT_PUBLIC)


def signature(secret: str, sent_at: int, body: bytes) -> str:
    """The header `Asap-Signature`: seconds since the epoch, HMAC-SHA256 of them and the body."""
    mac = hmac.new(secret.encode(), b"%d." % sent_at + body, hashlib.sha256)
    return f"t={sent_at},v1={mac.hexdigest()}"


def _resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a name, in the system's order. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(place[0]) for *_, place in found))


class WebhookCaller:
    """Sends events to receivers.

    Args:
        settings: the hosts and the secret.
        resolve: the addresses of a host and port. Blocking; raises OSError for an unknown name.
        may_call: whether one of these addresses may be connected to.
        tls: whom to trust; default: the usual authorities, or those of SSL_CERT_FILE.
    """

    def __init__(
        self,
        settings: WebhookSettings,
        *,
        resolve: Resolve = _resolve,
        may_call: Callable[[str], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._settings, self._resolve, self._may_call = settings, resolve, may_call
        self._tls = tls or httpx.create_ssl_context()
        self._resolvers = ThreadPoolExecutor(RESOLVERS, thread_name_prefix="webhook-resolver")

    async def send(self, url: str, event_id: str, body: bytes) -> Answer:
        """One call, ended within 5 s; trouble of any kind is an answer, never an exception."""
        try:
            check_url(url, self._settings)
        except InvalidInput:
            return Answer("refused", "host not allowed")
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._send(httpx.URL(url), event_id, body)
        except TimeoutError:
            return Answer("failed", "timeout")
        except OSError:
            return Answer("failed", "unknown host")
        except httpx.TransportError:
            return Answer("failed", "broken answer")

    async def _send(self, url: httpx.URL, event_id: str, body: bytes) -> Answer:
        loop = asyncio.get_running_loop()
        addresses = await loop.run_in_executor(
            self._resolvers, self._resolve, url.host, url.port or 443
        )
        if not all(map(self._may_call, addresses)):
            return Answer("refused", "private address")
        assert self._settings.secret is not None
        headers = {
            "Host": url.netloc.decode(),
            "Content-Type": "application/json",
            "User-Agent": "asap-webhook",
            "Asap-Event-Id": event_id,
            "Asap-Signature": signature(
                self._settings.secret.get_secret_value(), int(time.time()), body
            ),
        }
        answer = Answer("failed", "unknown host")
        for address in addresses:
            request = httpx.Request(
                "POST",
                url.copy_with(host=address),
                headers=headers,
                content=body,
                extensions={"sni_hostname": url.host, "timeout": {"connect": CONNECT_S}},
            )
            try:
                return Answer.of_status(await self._status_of(request))
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                answer = Answer("failed", "TLS" if _is_tls(error) else "no connection")
        return answer

    async def _status_of(self, request: httpx.Request) -> int:
        # The bare transport: a client would log the URL, read the environment, decode the body.
        async with httpx.AsyncHTTPTransport(verify=self._tls, trust_env=False) as transport:
            response = await transport.handle_async_request(request)
            await response.aclose()
            return response.status_code


def _is_tls(error: BaseException | None) -> bool:
    """Whether the certificate or the handshake was the reason."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__context__  # httpcore hides the cause
    return error is not None
