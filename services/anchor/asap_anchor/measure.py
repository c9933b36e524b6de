"""Requests to the LLM server as metrics and spans: outcome, seconds, tokens and cost, no text."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from asap.errors import UpstreamError
from asap.ports import ChatResult
from asap_anchor.failures import Transient
from asap_runtime.logs import get_logger
from asap_runtime.telemetry import BREAKER_OPEN, llm_request

__all__ = ["measure", "show_breaker"]


async def measure(model: str, request: Awaitable[ChatResult]) -> ChatResult:
    """Await one request; each retry is a request of its own."""
    with llm_request(model) as seen:
        try:
            result = await request
        except Transient as failure:
            seen.outcome = failure.error.problem_code
            raise
        except UpstreamError as error:
            seen.outcome = error.problem_code
            raise
        usage = result.usage
        seen.outcome, seen.cost_usd = "ok", usage.cost_usd
        seen.prompt_tokens, seen.completion_tokens = usage.prompt_tokens, usage.completion_tokens
        return result


def show_breaker(upstream: str) -> Callable[[bool], None]:
    """What to call when the breaker of that server opens or closes."""
    BREAKER_OPEN.labels(upstream).set(0)

    def show(is_open: bool) -> None:
        BREAKER_OPEN.labels(upstream).set(is_open)
        get_logger().warning("breaker.changed", upstream=upstream, open=is_open)

    return show
