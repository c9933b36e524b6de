"""Where models are served: what deployments announce, and gateways route to.

A row is a lease. The process that keeps a server running renews it; when it dies the row goes
stale, and no gateway sees it any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from asap.errors import InvalidInput
from asap_runtime.database import Database, after, now
from asap_runtime.tables import endpoints

__all__ = ["LEASE_S", "Endpoint", "EndpointRegistry", "check_url"]

LEASE_S = 15.0
"""Renew three times as often."""
KEPT_S = 3600.0
"""How long a row whose lease is over is kept for people to look at."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server of one model version. `url` has no path; a draining one takes no new requests."""

    tenant: str
    model: str
    version: int | None
    url: str
    draining: bool
    baseline_tokens: float | None
    """Mean tokens of a completion of the model it was made from, where that was measured."""


class EndpointRegistry:
    """The endpoints of all tenants. Blocking; safe to share between threads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def announce(
        self,
        tenant: str,
        model: str,
        url: str,
        *,
        version: int | None = None,
        baseline_tokens: float | None = None,
        lease_s: float = LEASE_S,
    ) -> None:
        """Say, or say again, that the model is served here for the next `lease_s` seconds.

        Once more is the heartbeat; it ends neither draining nor forgets anything. Raises
        InvalidInput for a URL that is none.
        """
        check_url(url)
        facts: dict[str, Any] = {
            "version": version,
            "baseline_tokens": baseline_tokens,
            "lease_until": after(lease_s),
        }
        renewed = update(endpoints).where(*_is(tenant, model, url)).values(facts)
        first = insert(endpoints).values(
            tenant=tenant, model=model, url=url, draining=0, created_at=now(), **facts
        )
        with self._database.write() as connection:
            if connection.execute(renewed).rowcount:
                return
        try:
            with self._database.write() as connection:
                connection.execute(first)
        except IntegrityError:  # announced by another process a moment ago
            with self._database.write() as connection:
                connection.execute(renewed)

    def drain(self, tenant: str, model: str, url: str) -> None:
        """No new requests from now on; what runs there goes on."""
        with self._database.write() as connection:
            connection.execute(update(endpoints).where(*_is(tenant, model, url)).values(draining=1))

    def withdraw(self, tenant: str, model: str, url: str) -> None:
        """Forget the endpoint, and those that went stale long ago; safe to repeat."""
        with self._database.write() as connection:
            connection.execute(delete(endpoints).where(*_is(tenant, model, url)))
            connection.execute(delete(endpoints).where(endpoints.c.lease_until < after(-KEPT_S)))

    def live(self) -> list[Endpoint]:
        """All whose lease runs, by tenant, model and URL."""
        statement = (
            select(
                endpoints.c.tenant,
                endpoints.c.model,
                endpoints.c.version,
                endpoints.c.url,
                endpoints.c.draining,
                endpoints.c.baseline_tokens,
            )
            .where(endpoints.c.lease_until > now())
            .order_by(endpoints.c.tenant, endpoints.c.model, endpoints.c.url)
        )
        with self._database.read() as connection:
            return [
                Endpoint(**{**row, "draining": bool(row["draining"])})
                for row in connection.execute(statement).mappings()
            ]


def check_url(url: str) -> None:
    """Raise InvalidInput unless it is the root of an HTTP server, such as http://vllm-0:8000."""
    try:
        address = urlsplit(url)
        works = (
            address.scheme in ("http", "https")
            and bool(address.hostname)
            and address.port != 0
            and address.username is None
            and address.path in ("", "/")
            and not (address.query or address.fragment)
        )
    except ValueError:  # half an IPv6 address, a port beyond 65535
        works = False
    if not works:
        raise InvalidInput("an endpoint's address looks like http://host:8000, without a path")


def _is(tenant: str, model: str, url: str) -> tuple[Any, ...]:
    return endpoints.c.tenant == tenant, endpoints.c.model == model, endpoints.c.url == url
