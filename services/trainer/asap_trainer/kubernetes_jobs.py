"""Runs as Kubernetes Jobs. What the cluster says is read anew at each look; nothing is remembered.

All calls have time-outs and run in threads: the official client blocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from asap.errors import AsapError, Conflict, NotFound
from asap.runs import Launch, TrainRun
from asap_runtime.kubernetes_api import (
    TIMEOUT_S,
    conditions,
    connect,
    is_lost,
    joined,
    translated,
    unavailable,
)
from asap_trainer.launcher import (
    LOG_BYTES,
    LOG_LINES,
    Status,
    ended,
    launch_name,
    own_lines,
)
from asap_trainer.manifest import CONTAINER, identity, job_manifest, selector, service_manifest
from asap_trainer.settings import TrainerSettings

__all__ = ["KubernetesLauncher"]

PAGE = 500
_OUT_OF_MEMORY, _REFUSED, _STOPPED = 137, 78, 143
# The pods of a run on several nodes end together: who ended by the first of these is to blame.
_BLAME = (_OUT_OF_MEMORY, _REFUSED)
_answers = partial(translated, "trainer.kubernetes")


class KubernetesLauncher:
    """Jobs in one namespace, of one installation."""

    def __init__(self, settings: TrainerSettings) -> None:
        self._settings, self._cluster = settings, settings.trainer.kubernetes
        self._connected: tuple[Any, Any] | None = None

    async def check(self) -> None:
        """See `Launcher.check`."""
        await asyncio.to_thread(self._check)

    async def launch(self, run: TrainRun, attempt: int) -> Launch:
        """See `Launcher.launch`."""
        name = launch_name(run.id, attempt)
        await asyncio.to_thread(self._launch, run, attempt, name)
        return Launch(launcher="kubernetes", name=name, attempt=attempt)

    async def look(self, launch: Launch) -> Status:
        """See `Launcher.look`."""
        return await asyncio.to_thread(self._look, launch.name)

    async def stop(self, launch: Launch) -> None:
        """See `Launcher.stop`."""
        await asyncio.to_thread(self._stop, launch.name)

    async def launched(self) -> Sequence[Launch]:
        """See `Launcher.launched`."""
        jobs = await asyncio.to_thread(self._jobs)
        return [
            Launch(
                launcher="kubernetes",
                name=job.metadata.name,
                attempt=int(job.metadata.labels["asap/attempt"]),
            )
            for job in jobs
            if not _reasons(job).keys() & {"Complete", "Failed"}
        ]

    @property
    def _batch(self) -> Any:
        return self._apis()[0]

    @property
    def _core(self) -> Any:
        return self._apis()[1]

    def _apis(self) -> tuple[Any, Any]:
        if self._connected is None:
            self._connected = _connect(self._cluster.kubeconfig)
        return self._connected

    def _check(self) -> None:
        with _answers():
            self._batch.list_namespaced_job(
                self._cluster.namespace,
                label_selector=joined(selector(self._settings)),
                limit=1,
                _request_timeout=TIMEOUT_S,
            )

    def _launch(self, run: TrainRun, attempt: int, name: str) -> None:
        space = self._cluster.namespace
        body = job_manifest(run, attempt, self._settings)
        try:
            with _answers():
                job = self._batch.create_namespaced_job(space, body, _request_timeout=TIMEOUT_S)
        except Conflict:
            job = self._adopted(run, attempt, name)
        if run.config.nodes > 1:
            service = service_manifest(run, attempt, self._settings, job.metadata.uid)
            with suppress(Conflict), _answers():
                self._core.create_namespaced_service(space, service, _request_timeout=TIMEOUT_S)

    def _adopted(self, run: TrainRun, attempt: int, name: str) -> Any:
        """The Job of this name, when it is this very attempt. Raises Conflict."""
        job = self._job(name)
        if job is None:  # deleted a moment ago
            raise unavailable(f"the Job {name} is being deleted")
        expected = selector(self._settings) | identity(run, attempt)
        labels: Mapping[str, str] = job.metadata.labels or {}
        if any(labels.get(key) != value for key, value in expected.items()):
            raise Conflict(f"the cluster has another Job with the name {name}")
        return job

    def _job(self, name: str) -> Any | None:
        try:
            with _answers():
                return self._batch.read_namespaced_job(
                    name, self._cluster.namespace, _request_timeout=TIMEOUT_S
                )
        except NotFound:
            return None

    def _look(self, name: str) -> Status:
        job = self._job(name)
        if job is None:
            return Status("gone")
        reasons = _reasons(job)
        if "Complete" in reasons:
            return Status("succeeded", exit_code=0)
        pods = self._pods(name)
        if "Failed" in reasons:
            return self._why(reasons["Failed"], pods)
        if job.spec.suspend:
            return Status("waiting", "suspended")
        if pods and all(pod.status.phase != "Pending" for pod in pods):
            return Status("running")
        return Status("waiting", next(filter(None, map(_pending_reason, pods)), "no-pod"))

    def _why(self, reason: str, pods: Sequence[Any]) -> Status:
        """Of a Job that failed: the run itself, or what carried it."""
        if reason == "DeadlineExceeded":
            return Status("failed", "deadline", log=self._log(pods))
        if any(is_lost(pod) for pod in pods):
            return Status("evicted", "evicted")
        codes = {pod.metadata.name: code for pod in pods if (code := _exit_code(pod))}
        if not codes:  # its node has gone, and the pod with it
            return Status("evicted", "node-lost")
        blamed = min(codes, key=lambda name: _guilt(codes[name]))
        status = ended(codes[blamed])
        if status.phase != "failed":
            return status
        log = self._log([pod for pod in pods if pod.metadata.name == blamed])
        return ended(codes[blamed], log)

    def _stop(self, name: str) -> None:
        from kubernetes import client

        with suppress(NotFound), _answers():
            self._batch.delete_namespaced_job(
                name,
                self._cluster.namespace,
                # Left out, the API's own default would orphan the pods.
                body=client.V1DeleteOptions(propagation_policy="Background"),
                _request_timeout=TIMEOUT_S,
            )

    def _pods(self, name: str) -> Sequence[Any]:
        with _answers():
            found: Sequence[Any] = self._core.list_namespaced_pod(
                self._cluster.namespace,
                label_selector=f"batch.kubernetes.io/job-name={name}",
                _request_timeout=TIMEOUT_S,
            ).items
        return sorted(found, key=lambda pod: str(pod.metadata.name))

    def _jobs(self) -> Sequence[Any]:
        """All Jobs of this installation. A list whose pages grew too old is read anew."""
        found: list[Any] = []
        page: str | None = None
        while True:
            try:
                with _answers():
                    part = self._batch.list_namespaced_job(
                        self._cluster.namespace,
                        label_selector=joined(selector(self._settings)),
                        limit=PAGE,
                        _continue=page,
                        _request_timeout=TIMEOUT_S,
                    )
            except Conflict:  # it has changed too much since
                found, page = [], None
                continue
            found += part.items
            page = part.metadata._continue
            if not page:
                return found

    def _log(self, pods: Sequence[Any]) -> tuple[str, ...]:
        """The last lines of the first of the pods that has any; trouble leaves none."""
        for pod in pods:
            with suppress(AsapError), _answers():
                # Read as bytes: the client's own text of a log is b'…' in some versions.
                answer = self._core.read_namespaced_pod_log(
                    pod.metadata.name,
                    self._cluster.namespace,
                    container=CONTAINER,
                    tail_lines=4 * LOG_LINES,
                    limit_bytes=LOG_BYTES,
                    _preload_content=False,
                    _request_timeout=TIMEOUT_S,
                )
                if lines := own_lines(answer.data.decode(errors="replace")):
                    return lines
        return ()


def _connect(kubeconfig: Path | None) -> tuple[Any, Any]:
    api = connect(
        None if kubeconfig is None else str(kubeconfig.expanduser()),
        expected="trainer.kubernetes.kubeconfig, or a pod with a service account",
    )
    from kubernetes import client  # `connect` says when it is not installed

    return client.BatchV1Api(api), client.CoreV1Api(api)


def _reasons(job: Any) -> dict[str, str]:
    """Reason of each condition that is true."""
    return {name: one.reason or "" for name, one in conditions(job.status).items()}


def _exit_code(pod: Any) -> int | None:
    """Of the training process; None while it runs, and for a pod that never ran."""
    for container in pod.status.container_statuses or ():
        if container.name == CONTAINER and container.state.terminated is not None:
            return int(container.state.terminated.exit_code)
    return None


def _guilt(code: int) -> tuple[bool, int]:
    """Sorts causes before what they cause: the others of a broken run are stopped, or crash."""
    order = _BLAME.index(code) if code in _BLAME else len(_BLAME)
    return code == _STOPPED, order


def _pending_reason(pod: Any) -> str | None:
    """Why a pod does not run yet, in the cluster's words, such as ImagePullBackOff."""
    for container in pod.status.container_statuses or ():
        if container.state.waiting is not None and container.state.waiting.reason:
            return str(container.state.waiting.reason)
    for condition in pod.status.conditions or ():
        if condition.status == "False" and condition.reason:
            return str(condition.reason)
    return None
