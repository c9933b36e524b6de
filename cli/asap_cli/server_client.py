"""Requests to one server: its answers read or streamed, its problems and a connection's as errors.

It knows no job and no terminal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Self

import httpx

from asap.errors import UpstreamError, UpstreamTimeout, UpstreamUnavailable
from asap_cli.answers import one_line, refusal
from asap_cli.connecting import connect

__all__ = ["ServerClient"]


class ServerClient:
    """Base of the clients of a server's parts. Every method may raise AsapError.

    Args:
        http: its base URL is the server's.
    """

    def __init__(self, http: httpx.Client) -> None:
        url = http.base_url
        self.server = f"{url.scheme}://{url.netloc.decode()}{url.path.rstrip('/')}"
        self.http = http

    @classmethod
    def open(cls, server: str, *, key: str | None = None) -> Self:
        """A client of the server at this URL, see `connect`. Connects at the first call."""
        return cls(connect(server, key))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def send(self, request: httpx.Request) -> httpx.Response:
        """A successful answer, read."""
        with self.translated(), closing(self.open_answer(request)) as response:
            response.read()
            return response

    def open_answer(self, request: httpx.Request) -> httpx.Response:
        """A successful answer whose body has not been read."""
        with self.translated():
            response = self.http.send(request, stream=True)
            if response.is_success:
                return response
            with closing(response):
                response.read()
        raise refusal(response, self.server)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Trouble with the connection inside of the block becomes an AsapError."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise UpstreamUnavailable(
                f"no server answers at {self.server}; start one with `asap serve`, or name "
                "another with --server"
            ) from error
        except httpx.TimeoutException as error:
            raise UpstreamTimeout(f"{self.server} did not answer in time") from error
        except httpx.TransportError as error:
            reason = one_line(str(error)) or type(error).__name__
            raise UpstreamUnavailable(
                f"the connection to {self.server} broke off: {reason}"
            ) from error
        except httpx.DecodingError as error:
            raise UpstreamError(f"the answer of {self.server} is garbled") from error
