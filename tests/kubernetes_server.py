"""A Kubernetes API on a free port for the real client: objects of one namespace as plain data.

What objects bring about is the work of controllers (see `kubernetes_pods`); those of other kinds
join by `controllers`. A kind that is only kept needs a row in `KINDS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import kubernetes_validate
from aiohttp import web

from kubernetes_deployments import DeploymentController
from kubernetes_pods import JobController, Pods, now

KINDS = {
    "deployments": ("apps/v1", "Deployment"),
    "jobs": ("batch/v1", "Job"),
    "pods": ("v1", "Pod"),
    "replicasets": ("apps/v1", "ReplicaSet"),
    "services": ("v1", "Service"),
}
OF_THE_SERVER = ("uid", "creationTimestamp", "generation", "resourceVersion")
"""Parts of metadata that nobody else may set."""
REASONS = {
    403: "Forbidden", 404: "NotFound", 409: "AlreadyExists", 410: "Expired", 422: "Invalid",
    500: "InternalError",
}  # fmt: skip


@dataclass
class Fault:
    """What one request gets instead of its answer; status 0 drops the connection, None is no fault.
    `plural` may name a subresource, too; the method of a watch is WATCH.
    """

    method: str
    plural: str
    status: int | None
    message: str = "a fault of the test"
    skip: int = 0
    """So many pass before it strikes, once."""
    after: bool = False
    """Carry the request out; only its answer is lost."""
    first: Callable[[], Awaitable[None]] | None = None
    """What happens in the cluster a moment before."""


class KubernetesServer:
    """`async with KubernetesServer(folder) as cluster`: objects, faults, and what was asked."""

    def __init__(self, folder: Path, *, python: str = sys.executable, schemas: str = "1.32"):
        self.folder, self.python, self.schemas = folder, python, schemas
        self.kubeconfig = folder / "kubeconfig.json"
        self.objects: dict[tuple[str, str], dict] = {}
        self.secrets: dict[str, dict[str, str]] = {}
        self.faults: list[Fault] = []
        self.calls: list[tuple[str, str, str]] = []
        self.pods = Pods(self)
        self.deployments = DeploymentController(self)
        self.jobs = JobController(self)
        self.controllers: dict[str, Callable[[dict], Awaitable[None]]] = {
            "deployments": self.deployments.run,
            "jobs": self.jobs.run,
        }
        self._away = False
        self.watches: set[asyncio.Transport] = set()
        """Connections of those that are under way."""
        self._at_work: dict[tuple[str, str], asyncio.Task] = {}
        self._ending: list[asyncio.Task] = []
        self._events: list[tuple[int, str, str, dict]] = []
        self.version, self._oldest = 0, 0
        self._changed = asyncio.Condition()

    async def __aenter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        app = web.Application()
        for root in ("/api/{version}", "/apis/{group}/{version}"):
            path = root + "/namespaces/{space}/{plural}"
            for end in ("", "/{name}", "/{name}/{sub}"):
                app.router.add_route("*", path + end, self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        self._write_kubeconfig(f"http://127.0.0.1:{port}")
        return self

    async def __aexit__(self, *_):
        for task in self._at_work.values():
            task.cancel()
        await asyncio.gather(*self._at_work.values(), *self._ending, return_exceptions=True)
        await self._runner.cleanup()

    def _write_kubeconfig(self, url):
        one = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": url}}],
            "users": [{"name": "test", "user": {"token": "token"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }
        self.kubeconfig.write_text(json.dumps(one))

    # What tests do to the cluster.

    def named(self, plural):
        """Names of the objects of a kind."""
        return sorted(name for kind, name in self.objects if kind == plural)

    async def until(self, condition):
        """Wait until the condition holds, as seen after each change of an object."""
        async with self._changed:
            await self._changed.wait_for(condition)

    async def running(self, job):
        """The first pod of the Job, once it runs."""

        def pods():
            return [
                pod["metadata"]["name"]
                for (kind, _), pod in self.objects.items()
                if kind == "pods"
                and pod["metadata"]["labels"].get("batch.kubernetes.io/job-name") == job
                and pod["status"]["phase"] == "Running"
            ]

        await self.until(pods)
        return pods()[0]

    async def vanish(self, job):
        """Job and pods are gone, as if they had never been."""
        await self.remove("jobs", job)

    async def resume(self, job):
        """What a queueing controller does to a Job that it lets go."""
        self.objects["jobs", job]["spec"]["suspend"] = False
        await self.touch("jobs", job)

    def overdue(self, job):
        """The Job has taken as long as it says that it may."""
        deadline = self.jobs.deadlines[job]
        assert deadline.when() is not None
        deadline.reschedule(asyncio.get_running_loop().time())

    async def schedule(self):
        """There is a node for pending pods from now on; `pods.scheduling` off is none."""
        self.pods.scheduling = True
        async with self._changed:
            self._changed.notify_all()

    async def evict(self, pod):
        """The node wants its room back: the pod is told so, and ends."""
        disrupted = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "EvictionByEvictionAPI",
        }
        self.objects["pods", pod]["status"]["conditions"] = [disrupted]
        await self.touch("pods", pod)
        self.pods.terminate(pod)

    def drop_watches(self):
        """The connections of all watches break."""
        while self.watches:
            self.watches.pop().close()

    def leave(self):
        """From now on nobody is heard."""
        self._away = True
        self.drop_watches()

    def come_back(self):
        """Requests are answered again."""
        self._away = False

    # The API.

    async def _answer(self, request):
        plural = request.match_info["plural"]
        name = request.match_info.get("name", "")
        method = "WATCH" if _is_watch(request) else request.method
        self.calls.append((method, plural, name))
        if self._away:
            request.transport.close()
            return self._status(500, "away")
        fault = self._fault(method, request.match_info.get("sub") or plural)
        if fault is not None and fault.first is not None:
            await fault.first()
        if fault is not None and fault.status is None:
            fault = None
        answer = None
        if fault is None or fault.after:
            answer = await self._carry_out(request, plural, name)
        if fault is None:
            return answer
        if fault.status == 0:
            request.transport.close()
        return self._status(fault.status or 500, fault.message)

    def _fault(self, method, plural):
        for fault in self.faults:
            if (fault.method, fault.plural) == (method, plural):
                fault.skip -= 1
                if fault.skip < 0:
                    self.faults.remove(fault)
                    return fault
                return None
        return None

    async def _carry_out(self, request, plural, name):
        if plural not in KINDS:
            return self._status(404, f"no kind {plural}")
        if request.method == "POST":
            return await self._create(plural, await request.json())
        if not name:
            return await self._list(request, plural)
        if (plural, name) not in self.objects:
            return self._status(404, f"{plural} {name} not found")
        sub = request.match_info.get("sub")
        if sub == "log":
            return self._log(name, int(request.query.get("tailLines", 10**6)))
        if request.method == "DELETE":
            return await self._delete(request, plural, name)
        if request.method == "PUT":
            return await self._replace(plural, name, await request.json(), sub)
        return web.json_response(self.objects[plural, name])

    async def _create(self, plural, body):
        version, kind = KINDS[plural]
        body = {"apiVersion": version, "kind": kind} | body
        if refusal := await self._refusal(body):
            return refusal
        name = body["metadata"]["name"]
        if (plural, name) in self.objects:
            return self._status(409, f"{plural} {name} already exists")
        await self.create(plural, body)
        return web.json_response(body, status=201)

    async def _refusal(self, body):
        """What is said of an object that is none."""
        try:
            await asyncio.to_thread(kubernetes_validate.validate, body, self.schemas, strict=True)
        except kubernetes_validate.ValidationError as error:
            return self._status(422, error.message)
        return None

    async def _list(self, request, plural):
        if _is_watch(request):
            return await self._watch(request, plural)
        wanted = _selector(request)
        found = [
            body
            for (kind, _), body in sorted(self.objects.items())
            if kind == plural and _matches(body, wanted)
        ]
        version, start = (request.query.get("continue") or f"{self.version}:0").split(":")
        if int(version) < self._oldest:
            return self._status(410, "the continue parameter is too old")
        end = int(start) + int(request.query.get("limit") or len(found) or 1)
        metadata = {"resourceVersion": version}
        if end < len(found):
            metadata["continue"] = f"{version}:{end}"
        api, kind = KINDS[plural]
        page = found[int(start) : end]
        return web.json_response(
            {"apiVersion": api, "kind": f"{kind}List", "metadata": metadata, "items": page}
        )

    async def _watch(self, request, plural):
        """Events after a version, until the time-out that the client names."""
        wanted = _selector(request)
        seen = int(request.query.get("resourceVersion") or 0)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if seen < self._oldest:
            status = json.loads(self._status(410, "too old resource version").text)
            await response.write(json.dumps({"type": "ERROR", "object": status}).encode() + b"\n")
            return response
        self.watches.add(request.transport)
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(int(request.query.get("timeoutSeconds", 5))):
                while not request.transport.is_closing():
                    for version, kind, event, body in list(self._events):
                        if version > seen and kind == plural and _matches(body, wanted):
                            line = json.dumps({"type": event, "object": body})
                            await response.write(line.encode() + b"\n")
                    seen = self.version
                    async with self._changed:
                        await self._changed.wait_for(lambda: self.version > seen)  # noqa: B023
        self.watches.discard(request.transport)
        return response

    async def _replace(self, plural, name, body, sub):
        kept = self.objects[plural, name]
        version = body["metadata"].get("resourceVersion")
        if version not in (None, kept["metadata"]["resourceVersion"]):
            return self._status(409, "the object has been modified")
        before = json.dumps(kept, sort_keys=True)
        if sub == "status":
            kept["status"] = body["status"]
        else:
            if refusal := await self._refusal(body):
                return refusal
            own = {part: kept["metadata"][part] for part in OF_THE_SERVER}
            own["generation"] += body["spec"] != kept["spec"]
            kept |= {"metadata": body["metadata"] | own, "spec": body["spec"]}
        if json.dumps(kept, sort_keys=True) != before:
            await self.touch(plural, name)
        return web.json_response(kept)

    async def _delete(self, request, plural, name):
        options = await request.json() if request.can_read_body else {}
        uid = options.get("preconditions", {}).get("uid")
        if uid not in (None, self.objects[plural, name]["metadata"]["uid"]):
            return self._status(409, "the uid in the precondition is another one")
        policy = options.get("propagationPolicy") or request.query.get("propagationPolicy")
        # Over the raw API nothing that a Job owns goes with it unless the caller says so.
        await self.remove(plural, name, orphans=plural == "jobs" and policy is None)
        return web.json_response({"kind": "Status", "apiVersion": "v1", "status": "Success"})

    def _log(self, pod, lines):
        file = self.folder / pod / "log"
        text = file.read_text(errors="replace") if file.exists() else ""
        return web.Response(text="\n".join(text.splitlines()[-lines:]))

    def _status(self, code, message):
        body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code}
        return web.json_response(
            body | {"message": message, "reason": REASONS.get(code, "")}, status=code
        )

    # Objects.

    async def create(self, plural, body):
        """There is a new object, and its controller knows."""
        await self.add(plural, body)
        if controller := self.controllers.get(plural):
            key = plural, body["metadata"]["name"]
            self._at_work[key] = asyncio.create_task(controller(body))

    async def add(self, plural, body):
        body["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": now(), "generation": 1}
        body.setdefault("status", {})
        self.objects[plural, body["metadata"]["name"]] = body
        await self.touch(plural, body["metadata"]["name"], "ADDED")

    async def touch(self, plural, name, event="MODIFIED"):
        """There is a new version of the object, or its last."""
        self.version += 1
        body = self.objects[plural, name]
        body["metadata"]["resourceVersion"] = str(self.version)
        self._events.append((self.version, plural, event, json.loads(json.dumps(body))))
        async with self._changed:
            self._changed.notify_all()

    async def remove(self, plural, name, *, orphans=False):
        if (plural, name) not in self.objects:
            return
        await self.touch(plural, name, "DELETED")
        body = self.objects.pop((plural, name))
        if plural == "pods":
            self.pods.terminate(name)
        if orphans:
            return
        if task := self._at_work.pop((plural, name), None):
            task.cancel()  # ends the processes of its pods
            self._ending.append(task)
        owned = [
            key
            for key, other in self.objects.items()
            if body["metadata"]["uid"]
            in [owner["uid"] for owner in other["metadata"].get("ownerReferences", ())]
        ]
        for key in owned:
            await self.remove(*key)

    def forget_versions(self):
        """Watches and pages that began before now are too old."""
        self.version += 1
        self._oldest = self.version


def _is_watch(request):
    return request.query.get("watch", "").lower() == "true"


def _selector(request):
    """Terms of both selectors; that of fields is about names alone."""
    terms = ",".join(request.query.get(f"{kind}Selector", "") for kind in ("label", "field"))
    return [term.split("=") for term in terms.split(",")]


def _matches(body, wanted):
    facts = {"metadata.name": body["metadata"]["name"], **body["metadata"].get("labels", {})}
    return all(facts.get(key) == rest[0] for key, *rest in wanted if key)
