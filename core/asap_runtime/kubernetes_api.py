"""The Kubernetes API by the official client: connecting, its errors as ours, and what objects say.

The client blocks, and is imported only where it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from asap.errors import AsapError, CapacityError, Conflict, Misconfigured, NotFound

__all__ = [
    "TIMEOUT_S",
    "answer_of",
    "conditions",
    "connect",
    "is_lost",
    "joined",
    "translated",
    "unavailable",
]

TIMEOUT_S = (5.0, 30.0)
"""To connect, and between two parts of an answer."""
RETRY_S = 15.0
QUOTA_RETRY_S = 60.0
_LOST = frozenset({"Evicted", "NodeLost", "NodeShutdown", "Preempting", "Shutdown", "Terminated"})


def connect(kubeconfig: str | None, *, context: str | None = None, expected: str) -> Any:
    """A client of a cluster, which has not been asked anything yet.

    Args:
        kubeconfig: file, or several as in KUBECONFIG; None: the service account of this pod.
        context: of the file; default: the one that it names.
        expected: what is said when there is no such thing.

    Raises Misconfigured.
    """
    try:
        import yaml
        from kubernetes import client, config
    except ImportError as error:
        raise Misconfigured("a cluster needs the extra 'kubernetes'") from error
    configuration = client.Configuration()
    configuration.retries = False  # callers try again by their own rules
    try:
        if kubeconfig is not None:
            config.load_kube_config(kubeconfig, context, client_configuration=configuration)
        else:
            config.load_incluster_config(client_configuration=configuration)
    except (config.ConfigException, yaml.YAMLError, OSError) as error:
        raise Misconfigured(f"the cluster cannot be reached: expected {expected}") from error
    return client.ApiClient(configuration)


@contextmanager
def translated(check: str) -> Iterator[None]:
    """Whatever the client raises, as one of our errors; the answer's body is in none of them.

    `check`: whose fault it is when the cluster finds an object wrong.
    """
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        raise _error(error.status, str(error.body or ""), check) from error
    except (HTTPError, OSError) as error:
        raise unavailable("the cluster's API cannot be reached") from error


def answer_of(error: AsapError) -> tuple[int, str]:
    """Status and words of the answer that `translated` made the error from; 0 where there was none.

    The words may quote the object that was sent.
    """
    cause = error.__cause__
    status, body = getattr(cause, "status", 0) or 0, getattr(cause, "body", None)
    words = ""
    with suppress(ValueError, TypeError, AttributeError):
        words = str(json.loads(body or "{}").get("message", ""))
    return int(status), words


def unavailable(detail: str) -> CapacityError:
    """Trouble of the cluster's API, which passes."""
    return CapacityError(detail, code="cluster-unavailable", retry_after_s=RETRY_S)


def joined(labels: Mapping[str, str]) -> str:
    """A selector of all these labels."""
    return ",".join(f"{key}={value}" for key, value in labels.items())


def conditions(status: Any) -> dict[str, Any]:
    """The conditions of an object's status that are true, by type."""
    return {one.type: one for one in status.conditions or () if one.status == "True"}


def is_lost(pod: Any) -> bool:
    """Whether the cluster took the pod away, or its node."""
    return "DisruptionTarget" in conditions(pod.status) or pod.status.reason in _LOST


def _error(status: int, body: str, check: str) -> AsapError:
    errors: Mapping[int, Callable[[], AsapError]] = {
        400: lambda: Misconfigured(f"the cluster finds the object malformed: check {check}"),
        404: lambda: NotFound("the cluster has no such object"),
        409: lambda: Conflict("the cluster has an object of this name"),
        410: lambda: Conflict("this version of the cluster's objects is not to be had any more"),
        422: lambda: Misconfigured(f"the cluster finds the object invalid: check {check}"),
    }
    if status in errors:
        return errors[status]()
    if status == 403 and "exceeded quota" in body:
        return CapacityError(
            "the cluster's quota has no room",
            code="quota-refused",
            retry_after_s=QUOTA_RETRY_S,
        )
    return unavailable(f"the cluster's API answered {status}")
