"""Metrics and traces: the only file that spells their names. Logs are in `asap_runtime.logs`.

Metric labels are bounded; no question, CoT, answer or key ever gets here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import Counter, Gauge, Histogram

from asap_runtime.settings import TelemetrySettings

__all__ = [
    "BATCH_ROWS",
    "BATCH_TOKENS",
    "BREAKER_OPEN",
    "COARSE_ATTEMPTS",
    "COT_TOKENS",
    "DB_SECONDS",
    "GENERATE_REQUESTS",
    "GENERATE_SECONDS",
    "GENERATE_SERVER_STARTS",
    "GENERATE_TOKENS",
    "GRADES",
    "HTTP_SECONDS",
    "ITEMS",
    "ITEMS_OPEN",
    "LEASES_LOST",
    "OLDEST_DUE_SECONDS",
    "PROXY_FIRST_BYTE_SECONDS",
    "PROXY_FORCED",
    "PROXY_SECONDS",
    "PROXY_STREAMS",
    "PROXY_TOKENS",
    "QUEUE_ITEMS",
    "QUEUE_UP",
    "QUEUE_WAIT_SECONDS",
    "REPUBLISHED",
    "SANDBOX_LEVEL",
    "SANDBOX_SECONDS",
    "SANDBOX_TROUBLE",
    "SCORE_BUSY_SECONDS",
    "SCORE_OPERATIONS",
    "SCORE_PASSES",
    "SCORE_PEAK_RATE",
    "SCORE_ROWS",
    "SCORE_SECONDS",
    "SCORE_STEPS",
    "SCORE_TOKENS",
    "SELF_MESSAGE_AGE_SECONDS",
    "SHADOW_REQUESTS",
    "SHADOW_SECONDS_SAVED",
    "SHADOW_TOKENS_SAVED",
    "STAGE_SECONDS",
    "STALE_WRITES",
    "TRAIN_ETA_SECONDS",
    "TRAIN_GRAD_NORM",
    "TRAIN_LEARNING_RATE",
    "TRAIN_LOSS",
    "TRAIN_MEMORY_BYTES",
    "TRAIN_MFU",
    "TRAIN_STEPS",
    "TRAIN_TOKENS_PER_S",
    "LLMRequest",
    "annotate",
    "configure_traces",
    "llm_request",
    "span",
    "trace_carrier",
    "trace_context",
    "trace_parent",
]

EXPORT_S = 5.0
"""How long one message to the trace collector may take."""
FLUSH_S = 3.0
"""How long the end of the process waits for the collector; what is left then is lost."""

_SECONDS = (0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300, 1800)
_QUICK = (0.001, 0.005, 0.02, 0.05, 0.1, 0.3, 1, 5, 30)
_TOKENS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)

# Stages and items.
ITEMS = Counter("asap_items", "Items that left a stage", ["stage", "outcome"])
STAGE_SECONDS = Histogram("asap_stage_seconds", "Time in a stage", ["stage"], buckets=_SECONDS)
QUEUE_WAIT_SECONDS = Histogram(
    "asap_queue_wait_seconds", "From due to claimed", ["stage"], buckets=_SECONDS
)
STALE_WRITES = Counter("asap_stale_writes", "Writes refused by their fence", ["stage"])
COT_TOKENS = Histogram(
    "asap_cot_tokens", "Tokens of a CoT: original, coarse, pruned", ["part"], buckets=_TOKENS
)
COARSE_ATTEMPTS = Histogram(
    "asap_coarse_attempts", "Replies that one coarse CoT took", buckets=(0, 1, 2, 3, 5, 8, 16)
)

# What the one active sweeper sees in the database.
QUEUE_ITEMS = Gauge("asap_queue_items", "Due and running items: the scaling signal", ["stage"])
ITEMS_OPEN = Gauge("asap_items_open", "Items that are not final", ["stage", "status"])
OLDEST_DUE_SECONDS = Gauge("asap_oldest_due_seconds", "How long the oldest item is due", ["stage"])
LEASES_LOST = Counter("asap_leases_lost", "Items whose worker fell silent", ["stage"])
REPUBLISHED = Counter("asap_republished", "Items published by the sweeper", ["stage"])

# What this process sees of database, broker and callers.
QUEUE_UP = Gauge("asap_queue_up", "1 while the broker answers this process, else 0")
SELF_MESSAGE_AGE_SECONDS = Gauge(
    "asap_worker_selfmessage_age_seconds", "Since a message of this worker to itself came back"
)
DB_SECONDS = Histogram(
    "asap_db_seconds", "Database transactions: read, write", ["op"], buckets=_QUICK
)
HTTP_SECONDS = Histogram(
    "asap_http_seconds", "Until an answer begins", ["route", "status"], buckets=_QUICK
)

# The LLM server.
LLM_REQUESTS = Counter("asap_llm_requests", "Requests to the LLM server", ["model", "outcome"])
LLM_TOKENS = Counter("asap_llm_tokens", "Tokens: prompt, completion", ["model", "direction"])
LLM_SECONDS = Histogram("asap_llm_seconds", "Time of one request", ["model"], buckets=_SECONDS)
LLM_COST = Counter("asap_llm_cost", "US dollars paid, where prices are known", ["model"])
BREAKER_OPEN = Gauge("asap_breaker_open", "1 while the server is left alone, else 0", ["upstream"])
UPSTREAM_INFLIGHT = Gauge("asap_upstream_inflight", "Requests without an answer yet", ["model"])

# The scorer.
BATCH_TOKENS = Histogram("asap_batch_tokens", "Tokens of a scoring batch", buckets=_TOKENS)
BATCH_ROWS = Histogram(
    "asap_batch_rows", "Requests in a scoring batch", buckets=(1, 2, 4, 8, 16, 32, 64)
)
SCORE_SECONDS = Histogram(
    "asap_score_seconds", "Scoring: queue, tokenize, forward", ["part"], buckets=_SECONDS
)
SCORE_TOKENS = Counter(
    "asap_score_tokens", "Tokens of passes: run, reused from the round before", ["part"]
)
SCORE_ROWS = Counter("asap_score_rows", "Sequences, or windows of them, that passes ran")
SCORE_PASSES = Counter("asap_score_passes", "Forward passes")
SCORE_STEPS = Counter("asap_score_steps", "Steps that got their scores")
SCORE_BUSY_SECONDS = Counter("asap_score_busy_seconds", "Time in which the device worked")
# Share of the peak: rate(operations) / rate(busy seconds) / peak.
SCORE_OPERATIONS = Counter("asap_score_operations", "Floating-point operations of the passes")
SCORE_PEAK_RATE = Gauge(
    "asap_score_peak_rate", "Operations per second of one large matrix product, at the start"
)

# Training runs that this process looks at; a run's figures go when it ends.
TRAIN_STEPS = Counter("asap_train_steps", "Optimiser steps of all runs")
TRAIN_LOSS = Gauge("asap_train_loss", "Mean loss of a token, in nats", ["model"])
TRAIN_LEARNING_RATE = Gauge("asap_train_learning_rate", "Of the last step", ["model"])
TRAIN_GRAD_NORM = Gauge("asap_train_grad_norm", "Before it was clipped", ["model"])
TRAIN_TOKENS_PER_S = Gauge("asap_train_tokens_per_s", "Padding left out", ["model"])
TRAIN_MFU = Gauge("asap_train_mfu", "Share of the device's measured matrix rate", ["model"])
TRAIN_MEMORY_BYTES = Gauge("asap_train_memory_bytes", "Most that the device held", ["model"])
TRAIN_ETA_SECONDS = Gauge("asap_train_eta_seconds", "Until the run is done", ["model"])

# Live serving; models are those that are served.
PROXY_STREAMS = Gauge("asap_proxy_streams", "Live requests under way", ["model"])
PROXY_SECONDS = Histogram(
    "asap_proxy_seconds", "Live requests, whole", ["model", "status"], buckets=_SECONDS
)
PROXY_FIRST_BYTE_SECONDS = Histogram(
    "asap_proxy_first_byte_seconds", "Until a live answer begins", ["model"], buckets=_QUICK
)
PROXY_TOKENS = Counter(
    "asap_proxy_tokens", "Tokens: prompt, completion, and of that reasoning", ["model", "part"]
)
PROXY_FORCED = Counter(
    "asap_proxy_forced", "Thinkings that were closed: budget, loop", ["model", "reason"]
)
SHADOW_REQUESTS = Counter(
    "asap_shadow_requests", "Baselines asked: compared, failed, dropped", ["model", "outcome"]
)
# Sums that may fall: a compressed model need not be shorter each time.
SHADOW_TOKENS_SAVED = Gauge(
    "asap_shadow_tokens_saved", "Completion tokens below the baseline's, compared", ["model"]
)
SHADOW_SECONDS_SAVED = Gauge(
    "asap_shadow_seconds_saved", "Seconds below the baseline's, compared", ["model"]
)

# Evaluation: completions of a model, and what their programs came to.
GENERATE_REQUESTS = Counter("asap_generate_requests", "Tries of a completion", ["outcome"])
GENERATE_TOKENS = Counter(
    "asap_generate_tokens", "Of whole completions: prompt, completion", ["direction"]
)
GENERATE_SECONDS = Histogram(
    "asap_generate_seconds", "Until the first token, and the whole", ["part"], buckets=_SECONDS
)
GENERATE_SERVER_STARTS = Counter(
    "asap_generate_server_starts", "vLLM servers: ok, failed, adopted", ["outcome"]
)
GRADES = Counter("asap_grades", "Programs by what they came to", ["benchmark", "grade"])
SANDBOX_LEVEL = Gauge("asap_sandbox_level", "2 namespaces, 1 landlock, 0 no sandbox holds")
SANDBOX_SECONDS = Histogram("asap_sandbox_seconds", "Wall time of one program", buckets=_SECONDS)
SANDBOX_TROUBLE = Counter(
    "asap_sandbox_trouble", "Sandboxes that failed: retried, unscored, unavailable", ["reason"]
)

_PARENT = "traceparent"
_propagator = TraceContextTextMapPropagator()
_tracer: trace.Tracer = trace.NoOpTracer()


def configure_traces(settings: TelemetrySettings, role: str) -> Callable[[], None]:
    """Send spans as `asap-ROLE` to the collector of the settings; without one spans cost nothing.

    Call what is returned at the end of the process: it sends what is left, within `FLUSH_S`.
    Sampling and the collector's headers are those of OpenTelemetry's own variables.
    """
    if settings.otlp_endpoint is None:
        return lambda: None
    # Half a second of imports, which a process without a collector does without.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    global _tracer
    endpoint = settings.otlp_endpoint.get_secret_value().rstrip("/") + "/v1/traces"
    provider = TracerProvider(
        resource=Resource.create({"service.name": f"asap-{role}"}), shutdown_on_exit=False
    )
    provider.add_span_processor(
        BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_S))
    )
    _tracer = provider.get_tracer("asap")

    def shutdown() -> None:
        global _tracer
        _tracer = trace.NoOpTracer()
        # The library's own end tries again and again: 14 s with a collector that is down.
        ending = threading.Thread(target=provider.shutdown, daemon=True)
        ending.start()
        ending.join(FLUSH_S)

    return shutdown


@contextmanager
def span(
    name: str,
    carrier: Mapping[str, str] | None = None,
    *,
    links: Sequence[Mapping[str, str]] = (),
    **attributes: str | int | float,
) -> Iterator[None]:
    """A trace span, a child of the current one.

    Args:
        name: what is done, without ids.
        carrier: the context that rode in a message; the span is that one's child, or a root when
            it is empty, whatever is current here.
        links: contexts of other spans that this work is for.
        **attributes: counts, names and ids.
    """
    context = None if carrier is None else _extracted(carrier)
    linked = [trace.get_current_span(_extracted(link)).get_span_context() for link in links]
    with _tracer.start_as_current_span(
        name,
        context=context,
        attributes=_ours(attributes),
        links=[trace.Link(other) for other in linked if other.is_valid],
        # Both would send the exception's message, which may quote a trace.
        record_exception=False,
        set_status_on_exception=False,
    ) as current:
        try:
            yield
        except Exception as error:
            current.set_status(trace.StatusCode.ERROR, type(error).__name__)
            raise


def annotate(**attributes: str | int | float) -> None:
    """Add counts, names and ids to the current span."""
    trace.get_current_span().set_attributes(_ours(attributes))


def trace_context() -> dict[str, str]:
    """The current trace context, to ride in a message; empty outside of any trace."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier


def trace_parent() -> str | None:
    """The current trace context as one short string, to be stored with a job."""
    return trace_context().get(_PARENT)


def trace_carrier(stored: str | None) -> dict[str, str]:
    """The inverse of `trace_parent`, as it rides in a message."""
    return {} if stored is None else {_PARENT: stored}


def _extracted(carrier: Mapping[str, str]) -> Context:
    return _propagator.extract(carrier, context=Context())


def _ours(attributes: Mapping[str, str | int | float]) -> dict[str, str | int | float]:
    return {f"asap.{name}": value for name, value in attributes.items()}


@dataclass(slots=True)
class LLMRequest:
    """What became of one request to an LLM server; its client fills this in."""

    outcome: str = "cancelled"
    """`ok`, or the code of the problem."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float | None = None


@contextmanager
def llm_request(model: str) -> Iterator[LLMRequest]:
    """Measure one request to an LLM server, and trace it as `chat MODEL`."""
    request, started = LLMRequest(), time.perf_counter()
    with span(f"chat {model}"), UPSTREAM_INFLIGHT.labels(model).track_inprogress():
        try:
            yield request
        finally:
            LLM_SECONDS.labels(model).observe(time.perf_counter() - started)
            LLM_REQUESTS.labels(model, request.outcome).inc()
            LLM_TOKENS.labels(model, "prompt").inc(request.prompt_tokens)
            LLM_TOKENS.labels(model, "completion").inc(request.completion_tokens)
            LLM_COST.labels(model).inc(request.cost_usd or 0.0)
            annotate(outcome=request.outcome)
            # Names of OpenTelemetry's conventions for generative AI, which still change.
            trace.get_current_span().set_attributes(
                {
                    "gen_ai.operation.name": "chat",
                    "gen_ai.request.model": model,
                    "gen_ai.usage.input_tokens": request.prompt_tokens,
                    "gen_ai.usage.output_tokens": request.completion_tokens,
                }
            )
