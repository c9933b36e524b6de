"""The exception tree of the project. Codes are stable; HTTP and exit codes are mapped elsewhere.

AsapError(code, detail, retryable, context)
├─ InvalidInput            a malformed triple, dataset line, option or reply schema
├─ Unauthorized            no key, or one that opens nothing
├─ Forbidden               the key's role does not go so far
├─ CostCapReached          the job would cost, or has cost, more than its cap
├─ NotFound                a file, dataset, model or record that is not there
├─ Conflict                the object's state does not allow it
├─ Overloaded              too much work is waiting                 (retryable)
├─ CoarseExhausted         no valid coarse CoT within max_attempts, only when on_fail="drop"
├─ TrainingFailed          a training run came to a bad end of its own
├─ UpstreamError           the LLM server answered nonsense
│   ├─ UpstreamTimeout     … not in time                            (retryable)
│   └─ UpstreamUnavailable … with 429, 5xx or a refused connection  (retryable)
├─ CapacityError           device out of memory                     (retryable)
│   └─ StorageFull         … no room on the server's disk           (retryable)
└─ Misconfigured           a setting that cannot work, found at the start
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AsapError",
    "CapacityError",
    "CoarseExhausted",
    "Conflict",
    "CostCapReached",
    "Forbidden",
    "InvalidInput",
    "Misconfigured",
    "NotFound",
    "Overloaded",
    "StorageFull",
    "TrainingFailed",
    "Unauthorized",
    "UpstreamError",
    "UpstreamTimeout",
    "UpstreamUnavailable",
]


class AsapError(Exception):
    """A broken promise with a stable code; expected outcomes are values, never this.

    `detail` is one sentence for the user: what was expected, what came, what to do.
    `context` holds machine-readable facts (line number, field, status), never model text.
    """

    code: ClassVar[str] = "internal-error"
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str, *, code: str | None = None, **context: object) -> None:
        super().__init__(detail)
        self.detail = detail
        self.problem_code = code or self.code
        self.context = context


class InvalidInput(AsapError):
    """The caller's data or options are wrong; repeating the call cannot help."""

    code = "invalid-input"


class Unauthorized(AsapError):
    """There is no key, or it is unknown, expired or revoked; never says which."""

    code = "unauthorized"


class Forbidden(AsapError):
    """The key is good, but its role does not allow the call."""

    code = "forbidden-role"


class CostCapReached(AsapError):
    """LLM calls of the job would cost, or have cost, more than its cap allows."""

    code = "cost-cap-reached"


class NotFound(AsapError):
    """The named file, dataset, model or record does not exist."""

    code = "not-found"


class Conflict(AsapError):
    """What is asked does not fit the state of the object now."""

    code = "job-finished"


class Overloaded(AsapError):
    """The work was not accepted, because too much is waiting; `retry_after_s` says when to ask."""

    code = "overloaded"
    retryable = True


class CoarseExhausted(AsapError):
    """Stage 1 found no valid coarse CoT within `max_attempts` and `on_fail` is `drop`."""

    code = "coarse-exhausted"


class TrainingFailed(AsapError):
    """A training run ended without a model, by its own fault; `reason` is a short stable word,
    `log` the last lines that the training process logged.
    """

    code = "training-failed"


class UpstreamError(AsapError):
    """The LLM server's answer cannot be used."""

    code = "upstream-invalid"


class UpstreamTimeout(UpstreamError):
    """The LLM server did not answer in time."""

    code = "upstream-timeout"
    retryable = True


class UpstreamUnavailable(UpstreamError):
    """The LLM server refused (429, 5xx) or could not be reached."""

    code = "upstream-unavailable"
    retryable = True


class CapacityError(AsapError):
    """The device has too little memory for one batch at this moment."""

    code = "device-out-of-memory"
    retryable = True


class StorageFull(CapacityError):
    """The disk that holds uploads has too little room."""

    code = "insufficient-storage"


class Misconfigured(AsapError):
    """A setting cannot work: missing model, unreadable directory, unknown method."""

    code = "misconfigured"
