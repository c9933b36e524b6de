"""What can go wrong between us and an LLM server: which failures deserve a retry, and the sentences
for those that stay. No sentence holds the server's body, the prompt or the key.

An error with `waits=True` in its context is nobody's failure: the server wants the call later.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from typing import Any, Literal

from asap.errors import UpstreamError, UpstreamTimeout, UpstreamUnavailable
from asap_anchor.wire import Refusal

__all__ = ["Failures", "Transient", "concerns", "retry_after_s"]

NO_WORDS = Refusal()
_ADVICE = {
    401: "check the API key",
    403: "the API key may not use this model",
    404: "check the base URL and the model name",
}


class Transient(Exception):
    """A transport failure worth a retry; `error` is what to raise when no retry is left."""

    def __init__(self, error: UpstreamError, retry_after_s: float | None = None) -> None:
        super().__init__(error.detail)
        self.error = error
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Failures:
    """Failures of one server, named in every sentence by host and port."""

    server: str
    model: str
    retries: int

    def timed_out(self, timeout_s: float) -> Transient:
        """No connection, or no complete reply, in time."""
        return Transient(
            UpstreamTimeout(
                f"The LLM server {self.server} gave no complete reply in time ({timeout_s:g} s)"
                f"{self._also()}: raise the time-out or lower the concurrency.",
                server=self.server,
            )
        )

    def unreachable(self) -> Transient:
        """Refused, reset or dropped, in the middle of a reply too."""
        return Transient(
            UpstreamUnavailable(
                f"The LLM server {self.server} could not be reached, or dropped the connection"
                f"{self._also()}: check that it runs and that the base URL is right.",
                server=self.server,
            )
        )

    def malformed(self) -> Transient:
        """Broken JSON or another schema: what a failing proxy sends for a moment."""
        return Transient(
            UpstreamError(
                f"The LLM server {self.server} answered with something that is not a chat "
                f"completion{self._also()}: check that the base URL ends in the path of an "
                "OpenAI-compatible API, often /v1.",
                server=self.server,
            )
        )

    def refused(
        self, status: int, headers: Mapping[str, str], refusal: Refusal = NO_WORDS
    ) -> Transient | UpstreamError:
        """An error status: transient (408, 409, 429, 5xx), or final.

        An account without credit is final for the call, and all others would meet it too.
        """
        if status == 402 or refusal.code == "insufficient_quota":
            return UpstreamUnavailable(
                f"The LLM server {self.server} answered {status}: the account's credit or quota "
                "is used up; add credit, or raise its limit.",
                server=self.server,
                status=status,
                account=True,
                waits=True,
            )
        if status not in (408, 409, 429) and status < 500:
            advice = _ADVICE.get(status, "it does not accept the request")
            return UpstreamError(
                f"The LLM server {self.server} answered {status} for model {self.model!r}: "
                f"{advice}.",
                server=self.server,
                status=status,
                # Compared with a word of the protocol, so no text of the server is kept.
                **({"param": "max_tokens"} if refusal.param == "max_tokens" else {}),
            )
        asked = retry_after_s(headers, now=time.time())
        known: dict[str, Any] = {} if asked is None else {"retry_after_s": asked}
        if status in (429, 503):
            known["waits"] = True
        return Transient(
            UpstreamUnavailable(
                f"The LLM server {self.server} answered {status}{self._also()}: "
                "lower the concurrency or try again later.",
                server=self.server,
                status=status,
                **known,
            ),
            asked,
        )

    def resting(self, seconds: float, reason: str) -> UpstreamUnavailable:
        """Calls are not even tried at the moment, because of what the last ones met."""
        return UpstreamUnavailable(
            f"The LLM server {self.server} is left alone for {seconds:.0f} s. {reason}",
            server=self.server,
            retry_after_s=seconds,
            waits=True,
        )

    def busy(self, seconds: float) -> UpstreamUnavailable:
        """As many calls are under way, or have their turn, as the server may be asked."""
        return UpstreamUnavailable(
            f"The LLM server {self.server} is asked as often as limits allow; this call comes "
            f"later, in {seconds:.0f} s or so.",
            server=self.server,
            retry_after_s=seconds,
            waits=True,
        )

    def in_batch(self, seconds: float) -> UpstreamUnavailable:
        """The reply comes with a batch; ask again later."""
        return UpstreamUnavailable(
            f"The reply of {self.server} comes with a batch.",
            server=self.server,
            retry_after_s=seconds,
            waits=True,
        )

    def batch_refused(self) -> UpstreamError:
        """The provider read the whole batch and took none of it."""
        return UpstreamError(
            f"The LLM server {self.server} refused a whole batch for model {self.model!r}: check "
            "that it takes this model in batches.",
            server=self.server,
        )

    def _also(self) -> str:
        return f", also after {self.retries} retries" if self.retries else ""


def concerns(error: UpstreamError) -> Literal["call", "server", "account"]:
    """Whom a failure concerns: one call or one moment, the server, or the account behind all."""
    if error.context.get("account"):
        return "account"
    status = error.context.get("status")
    refuses_this = isinstance(status, int) and 400 <= status < 500
    return "call" if refuses_this and status not in (401, 403, 404, 408) else "server"


def retry_after_s(headers: Mapping[str, str], *, now: float) -> float | None:
    """Seconds that a server asks to wait (`retry-after-ms`, `Retry-After`); None if it does not.

    `now` is in seconds since the epoch, for the form that names a date.
    """
    for header, per_second in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(header, "")) / per_second
        except ValueError:
            continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    try:
        date = parsedate_tz(headers.get("retry-after", ""))
        return max(0.0, mktime_tz(date) - now) if date else None
    except (ValueError, OverflowError, TypeError, IndexError):
        return None  # like a date, but none of this calendar
