"""A real HTTPS receiver of webhooks, with an authority of its own and answers that do as told."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache

import trustme

from asap_runtime.webhooks import WebhookCaller, WebhookSettings

NAME = "hooks.example"
SECRET = "a secret of at least thirty-two characters"
HERE = "127.0.0.1"

Answering = Callable[[asyncio.StreamWriter], Awaitable[None]]


@cache
def authority() -> trustme.CA:
    return trustme.CA()


def trusting() -> ssl.SSLContext:
    """What a caller that trusts our authority connects with."""
    context = ssl.create_default_context()
    authority().configure_trust(context)
    return context


@dataclass(frozen=True)
class Received:
    line: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """What came in: connections, the names asked for in TLS, whole requests."""

    port: int = 0
    connections: int = 0
    names: list[str | None] = field(default_factory=list)
    requests: list[Received] = field(default_factory=list)

    def url(self, path: str = "/ended") -> str:
        return f"https://{NAME}:{self.port}{path}"

    def settings(self) -> WebhookSettings:
        return WebhookSettings(hosts=(f"{NAME}:{self.port}",), secret=SECRET)

    def caller(self, **options: object) -> WebhookCaller:
        """A caller whose name server says that the receiver is here, and that is allowed to."""
        return WebhookCaller(
            self.settings(),
            **{
                "resolve": lambda host, port: [HERE],
                "may_call": lambda address: address == HERE,
                "tls": trusting(),
                **options,
            },
        )


def status(code: int, *headers: str) -> Answering:
    """Answers with this status."""
    lines = [f"HTTP/1.1 {code} Whatever", "Content-Length: 2", *headers, "", "ok"]
    return raw("\r\n".join(lines).encode())


def raw(answer: bytes) -> Answering:
    async def write(writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()

    return write


def in_turn(*answers: Answering) -> Answering:
    """Another answer for each request; the last one for all that follow."""
    waiting = list(answers)

    async def write(writer: asyncio.StreamWriter) -> None:
        await (waiting.pop(0) if len(waiting) > 1 else waiting[0])(writer)

    return write


@asynccontextmanager
async def receiving(
    answering: Answering,
    *,
    certificate: trustme.LeafCert | None = None,
    address: str = HERE,
    port: int = 0,
) -> AsyncIterator[Receiver]:
    """A receiver at the address until the block ends."""
    receiver = Receiver()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    (certificate or authority().issue_cert(NAME)).configure_cert(tls)
    tls.sni_callback = lambda connection, name, context: receiver.names.append(name)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        receiver.connections += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            line, *fields = head.strip().split("\r\n")
            headers = {name.lower(): value for name, value in (f.split(": ", 1) for f in fields)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            receiver.requests.append(Received(line, headers, body))
            await answering(writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the caller has gone
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(serve, address, port, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    async with server:
        yield receiver
