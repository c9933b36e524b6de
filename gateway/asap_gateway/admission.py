"""Whether new work is let in: the tenant's quota and the backlog of the whole system."""

from __future__ import annotations

import time

from asap.errors import InvalidInput, Overloaded
from asap_gateway.settings import GatewayLimits
from asap_runtime.drain_rate import DrainRate
from asap_runtime.ledger import JobLedger

__all__ = ["Admission"]

COUNTED_FOR_S = 1.0
"""How long a count is used again: it costs 80 ms where a million items are open."""
MOST_COUNTS = 1000


class Admission:
    """Counts open items by tenant, and all of them. Blocking; safe to share between threads.

    A refused caller hears when to ask again, from the speed at which items leave.
    """

    def __init__(self, ledger: JobLedger, limits: GatewayLimits) -> None:
        self._ledger, self._limits = ledger, limits
        self._drain = DrainRate()
        self._counts: dict[str | None, tuple[float, int]] = {}

    def check(self, tenant: str, items: int) -> None:
        """Refuse what cannot be taken now: too many triples in a body, too many open items.

        Raises InvalidInput (`too-many-items`) or Overloaded (`tenant-quota`, `overloaded`).
        """
        limits = self._limits
        if items > limits.max_inline_triples:
            raise InvalidInput(
                f"{items} triples in one body; at most {limits.max_inline_triples} are taken, "
                "upload a file instead",
                code="too-many-items",
            )
        excess = self._open(None) + items - limits.max_backlog
        if excess > 0:
            raise Overloaded(
                "too many items are open; try again later",
                retry_after_s=self._drain.retry_after_s(excess),
            )
        excess = self._open(tenant) + items - limits.max_open_items_per_tenant
        if excess > 0:
            raise Overloaded(
                f"at most {limits.max_open_items_per_tenant:,} items of a tenant may be open; "
                "try again when some are done",
                code="tenant-quota",
                retry_after_s=self._drain.retry_after_s(excess),
            )

    def _open(self, tenant: str | None) -> int:
        now = time.monotonic()
        at, count = self._counts.get(tenant, (-COUNTED_FOR_S, 0))
        if now - at >= COUNTED_FOR_S:
            count = self._ledger.open_items(tenant)
            if tenant is None:
                self._drain.observe(count)
            if len(self._counts) >= MOST_COUNTS:
                self._counts.clear()
            self._counts[tenant] = now, count
        return count
