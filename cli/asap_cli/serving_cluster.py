"""A served model in a cluster: its Deployment and Service are made, followed, and removed.

Nothing is remembered between two calls, so each of them can be repeated.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import Any

from asap.errors import (
    AsapError,
    CapacityError,
    Conflict,
    Forbidden,
    NotFound,
    UpstreamUnavailable,
)
from asap_cli.rollout import current_pods, judge
from asap_runtime.kubernetes_api import (
    TIMEOUT_S,
    answer_of,
    connect,
    joined,
    translated,
    unavailable,
)

__all__ = ["ServingCluster"]

Object = dict[str, Any]

LOOK_S = 10.0
"""How often pods are looked at while their Deployment does not change."""
PAUSE_S = 2.0
TRIES = 10
"""Of a change that others make, too, at the same moment."""
_NO_ACCESS = (401, 403)


class ServingCluster:
    """The cluster of the user's kubeconfig. Blocking.

    Args:
        context: of the kubeconfig; default: the one that it names.
        timeout_s: how long all calls together may wait for the cluster.
        say: gets one line whenever something has changed.

    Every method raises Misconfigured, Forbidden, and CapacityError (`cluster-unavailable`) when the
    API stays away until the time is over.
    """

    def __init__(
        self, *, context: str | None, timeout_s: float, say: Callable[[str], None]
    ) -> None:
        api = connect(
            os.environ.get("KUBECONFIG") or "~/.kube/config",
            context=context,
            expected="a kubeconfig, in KUBECONFIG or ~/.kube/config, with that context",
        )
        from kubernetes import client  # `connect` says when it is not installed

        self._core, self._apps = client.CoreV1Api(api), client.AppsV1Api(api)
        self._encoded: Callable[[Any], Object] = api.sanitize_for_serialization
        self._ends, self._say, self._said = time.monotonic() + timeout_s, say, ""

    def apply(self, *objects: Object) -> None:
        """Make the objects, or make those that are there like them; all else of them stays.

        Raises Conflict for objects that are somebody else's, before anything is changed, and
        CapacityError (`quota-refused`).
        """
        for wanted in objects:
            self._check_owner(wanted, self._read(wanted))
        for wanted in objects:
            self._tell(f"{_title(wanted)}: {self._put(wanted)}")

    def wait(self, deployment: Object) -> None:
        """Until the Deployment's pods are ready; tells what keeps them from it.

        Raises CapacityError (`rollout-incomplete`) when the time is over, UpstreamUnavailable when
        the server ends again and again, NotFound and Conflict when somebody else has removed or
        changed the Deployment.
        """
        for found in self._changes(deployment):
            if _arguments(self._encoded(found)) != _arguments(deployment):
                raise Conflict(f"somebody else has changed the {_title(deployment)}")
            rollout = judge(found, self._pods(found))
            self._tell(rollout.text)
            if rollout.ready:
                return
            if rollout.hopeless:
                raise UpstreamUnavailable(f"the server does not start: {rollout.text}")
            if self._left_s() <= 0:
                raise CapacityError(f"not ready in time: {rollout.text}", code="rollout-incomplete")

    def remove(self, *objects: Object) -> None:
        """Delete the objects, those of the pods too. Raises Conflict for somebody else's."""
        kept = [(wanted, self._read(wanted)) for wanted in objects]
        for wanted, one in kept:
            self._check_owner(wanted, one)
        for wanted, one in kept:
            if one is not None:
                with suppress(NotFound):
                    self._delete(wanted, one.metadata.uid)
            self._tell(f"{_title(wanted)}: {'was not there' if one is None else 'removed'}")

    def _put(self, wanted: Object) -> str:
        """Say the object as it is wanted; what became of it."""
        name = wanted["metadata"]["name"]
        for tried in range(TRIES):
            if tried:
                self._rest()
            kept = self._settled(wanted)
            self._check_owner(wanted, kept)
            if kept is None:
                with suppress(Conflict):
                    self._call("create", wanted, body=wanted)
                    return "created"
                continue
            # It carries the version that was read: a change in between is a conflict.
            body = _merged(self._encoded(kept), wanted)
            with suppress(Conflict, NotFound):
                made = self._call("replace", wanted, name, body=body)
                same = made.metadata.resource_version == kept.metadata.resource_version
                return "unchanged" if same else "changed"
        raise Conflict(f"others keep changing the {_title(wanted)}")

    def _check_owner(self, wanted: Object, kept: Any | None) -> None:
        if kept is None:
            return
        labels: Mapping[str, str] = kept.metadata.labels or {}
        if labels.get("app.kubernetes.io/managed-by") == "Helm":
            raise Conflict(
                f"the {_title(wanted)} belongs to a release of the chart: change its values"
            )
        expected = wanted["metadata"]["labels"]
        if any(labels.get(key) != value for key, value in expected.items()):
            raise Conflict(
                f"the {_title(wanted)} is somebody else's; name the model otherwise, with --name"
            )

    def _changes(self, wanted: Object) -> Iterator[Any]:
        """The Deployment as it is, after each change, and every LOOK_S. Watches that are lost or
        too old begin anew with what is there now.
        """
        space, name = wanted["metadata"]["namespace"], wanted["metadata"]["name"]
        selected = {"namespace": space, "field_selector": f"metadata.name={name}"}
        while True:
            found = self._asked(self._apps.list_namespaced_deployment, **selected)
            if not found.items:
                raise NotFound(f"somebody else has removed the {_title(wanted)}")
            yield found.items[0]
            try:
                # The list's version: that of an object which rests grows too old for a watch.
                yield from self._watched(selected, found.metadata.resource_version)
            except Conflict:
                pass
            except CapacityError as error:
                self._tolerate(error)
            self._rest()

    def _watched(self, selected: Mapping[str, str], version: str) -> Iterator[Any]:
        from kubernetes import watch

        window = math.ceil(max(min(LOOK_S, self._left_s()), 1))
        events = watch.Watch().stream(
            self._apps.list_namespaced_deployment,
            **selected,
            resource_version=version,
            timeout_seconds=window,
            _request_timeout=(TIMEOUT_S[0], window + TIMEOUT_S[1]),
        )
        with _answers(), closing(events):
            for event in events:
                if event["type"] == "DELETED":
                    return
                yield event["object"]

    def _pods(self, deployment: Any) -> list[Any]:
        space, labels = deployment.metadata.namespace, deployment.spec.selector.match_labels
        replica_sets, pods = (
            self._asked(read, space, label_selector=joined(labels)).items
            for read in (self._apps.list_namespaced_replica_set, self._core.list_namespaced_pod)
        )
        return current_pods(deployment, replica_sets, pods)

    def _settled(self, wanted: Object) -> Any | None:
        """The object, but not while it is being deleted."""
        while True:
            kept = self._read(wanted)
            if kept is None or kept.metadata.deletion_timestamp is None:
                return kept
            self._tolerate(unavailable(f"the {_title(wanted)} is being deleted"))
            self._rest()

    def _read(self, wanted: Object) -> Any | None:
        try:
            return self._call("read", wanted, wanted["metadata"]["name"])
        except NotFound:
            return None

    def _delete(self, wanted: Object, uid: str) -> None:
        options = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        self._call("delete", wanted, wanted["metadata"]["name"], body=options)

    def _call(self, verb: str, wanted: Object, *name: str, **options: Any) -> Any:
        kind = wanted["kind"].lower()
        api = self._apps if kind == "deployment" else self._core
        method = getattr(api, f"{verb}_namespaced_{kind}")
        return self._asked(method, *name, wanted["metadata"]["namespace"], **options)

    def _asked(self, method: Callable[..., Any], *arguments: str, **options: Any) -> Any:
        """What the client's method returns, as soon as the cluster's API can be reached."""
        while True:
            try:
                with _answers():
                    return method(*arguments, **options, _request_timeout=TIMEOUT_S)
            except CapacityError as error:
                self._tolerate(error)
                self._rest()

    def _tolerate(self, error: CapacityError) -> None:
        """Tell it; raise what waiting does not mend."""
        if error.problem_code != "cluster-unavailable" or self._left_s() <= 0:
            raise error
        self._tell(f"{error.detail}; trying again")

    def _rest(self) -> None:
        time.sleep(min(PAUSE_S, max(self._left_s(), 0)))

    def _left_s(self) -> float:
        return self._ends - time.monotonic()

    def _tell(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._say(text)


@contextmanager
def _answers() -> Iterator[None]:
    """`translated`, with the cluster's own words: they are about objects of the caller."""
    try:
        with translated("the options"):
            yield
    except AsapError as error:
        status, words = answer_of(error)
        detail = f"{error.detail}: {words}" if words else error.detail
        if not isinstance(error, CapacityError):
            raise type(error)(detail) from error
        if status not in _NO_ACCESS:
            raise unavailable(detail) from error
        if error.problem_code == "quota-refused":
            raise CapacityError(detail, code=error.problem_code) from error
        raise Forbidden(detail) from error


def _title(wanted: Object) -> str:
    return f"{wanted['kind']} {wanted['metadata']['name']}"


def _merged(kept: Any, wanted: Any) -> Any:
    """What is wanted, and of what is kept all that it says nothing about."""
    if not (isinstance(kept, dict) and isinstance(wanted, dict)):
        return wanted
    return {**kept, **{key: _merged(kept.get(key), value) for key, value in wanted.items()}}


def _arguments(deployment: Object) -> list[Any]:
    """What decides which model is served, and how."""
    containers = deployment["spec"]["template"]["spec"]["containers"]
    return [one.get("args") for one in containers]
