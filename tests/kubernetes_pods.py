"""What a cluster does with Jobs and pods: a pod is a process of this machine.

Its command runs with what its environment and secrets say, in folders that stand for its volumes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import uuid
from datetime import UTC, datetime

GRACE_S = 5.0


class JobFailed(Exception):
    """Why a Job has failed."""


class JobController:
    """Carries out Jobs, Indexed ones too, by their own rules on failures and time."""

    def __init__(self, server):
        self._server = server
        self.deadlines: dict[str, asyncio.Timeout] = {}

    async def run(self, job):
        """From its creation until it is Complete or Failed."""
        name, spec = job["metadata"]["name"], job["spec"]
        await self._server.until(lambda: not spec.get("suspend"))
        job["status"] |= {"startTime": now(), "active": spec.get("parallelism", 1)}
        await self._server.touch("jobs", name)
        try:
            async with asyncio.timeout(spec.get("activeDeadlineSeconds")) as deadline:
                self.deadlines[name] = deadline
                async with asyncio.TaskGroup() as group:
                    for index in range(spec.get("completions", 1)):
                        group.create_task(self._complete(job, index))
            condition = {"type": "Complete", "reason": "CompletionsReached"}
        except* TimeoutError:
            condition = {"type": "Failed", "reason": "DeadlineExceeded"}
        except* JobFailed as failed:
            condition = {"type": "Failed", "reason": str(failed.exceptions[0])}
        if ("jobs", name) in self._server.objects:
            job["status"] |= {"active": 0, "conditions": [condition | {"status": "True"}]}
            await self._server.touch("jobs", name)

    async def _complete(self, job, index):
        """Pods for one completion, until one ends well or the Job's policy says no."""
        failures = 0
        while True:
            pod, code = await self._server.pods.run(job, index)
            if code == 0:
                return
            action = _action(job, pod, code)
            if action == "FailJob":
                raise JobFailed("PodFailurePolicy")
            failures += action != "Ignore"
            if failures > job["spec"].get("backoffLimit", 6):
                raise JobFailed("BackoffLimitExceeded")


class Pods:
    """Runs pods; `scheduling` off leaves new ones pending."""

    def __init__(self, server):
        self._server, self.scheduling = server, True
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._told: set[str] = set()

    def terminate(self, name):
        """Send SIGTERM to the processes of a pod, once; without effect when it has ended."""
        if name in self._processes and name not in self._told:
            self._told.add(name)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._processes[name].pid, signal.SIGTERM)

    async def run(self, job, index):
        """A pod of the Job from its creation to its end, and its exit code."""
        owner, template = job["metadata"], job["spec"]["template"]
        name = f"{owner['name']}-{index}-{uuid.uuid4().hex[:5]}"
        labels = {"batch.kubernetes.io/job-name": owner["name"], "job-name": owner["name"]}
        reference = {"apiVersion": "batch/v1", "kind": "Job", "name": owner["name"]}
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "labels": template["metadata"]["labels"] | labels,
                "ownerReferences": [reference | {"uid": owner["uid"]}],
            },
            "spec": template["spec"],
            "status": {"phase": "Pending"},
        }
        if not self.scheduling:
            scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
            pod["status"]["conditions"] = [scheduled]
        await self._server.add("pods", pod)
        await self._server.until(lambda: self.scheduling)
        try:
            code = await self._run_container(pod, index)
        except asyncio.CancelledError:  # its Job has ended: it is deleted
            self._server.objects.pop(("pods", name), None)
            raise
        if ("pods", name) in self._server.objects:
            reason = {0: "Completed", 137: "OOMKilled"}.get(code, "Error")
            ended = {"terminated": {"exitCode": code, "reason": reason}}
            self._set(pod, "Failed" if code else "Succeeded", ended)
            await self._server.touch("pods", name)
        return pod, code

    async def _run_container(self, pod, index):
        """The exit code of the pod's command, a process group of this machine."""
        name, [container] = pod["metadata"]["name"], pod["spec"]["containers"]
        folder = self._server.folder / name
        mounts = {m["mountPath"]: folder / m["name"] for m in container.get("volumeMounts", ())}
        for path in mounts.values():
            path.mkdir(parents=True)
        environment = {"PATH": os.environ["PATH"], "JOB_COMPLETION_INDEX": str(index)}
        for entry in container.get("env", ()):
            mount = re.match(r"/[^/]*", entry["value"])
            here = mounts.get(mount[0]) if mount else None
            value = entry["value"]
            environment[entry["name"]] = value.replace(mount[0], str(here), 1) if here else value
        for source in container.get("envFrom", ()):
            environment |= self._server.secrets[source["secretRef"]["name"]]
        command = [
            re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], part)
            for part in (*container["command"], *container.get("args", ()))
        ]
        if subdomain := pod["spec"].get("subdomain"):  # what the cluster's DNS knows
            command = [re.sub(rf"[\w-]+\.{subdomain}\b", "127.0.0.1", part) for part in command]
        command[0] = self._server.python if command[0] == "python" else command[0]
        with (folder / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                env=environment,
                cwd=mounts.get(container.get("workingDir"), folder),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes[name] = process
        self._set(pod, "Running", {"running": {"startedAt": now()}})
        if ("pods", name) in self._server.objects:
            await self._server.touch("pods", name)
        try:
            code = await process.wait()
        finally:
            self.terminate(name)
            await asyncio.shield(self._end(name, process))
        return 128 - code if code < 0 else code

    async def _end(self, name, process):
        """After its grace whatever is left of a pod is killed."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        del self._processes[name]

    def _set(self, pod, phase, state):
        container = pod["spec"]["containers"][0]
        one = {
            "name": container["name"], "image": container["image"], "imageID": "",
            "ready": phase == "Running", "restartCount": 0, "state": state,
        }  # fmt: skip
        pod["status"] |= {"phase": phase, "containerStatuses": [one]}


def _action(job, pod, code):
    """What the Job's policy says of a pod that failed; the first rule that fits."""
    disrupted = {one["type"] for one in pod["status"].get("conditions", ())}
    for rule in job["spec"].get("podFailurePolicy", {}).get("rules", ()):
        codes = rule.get("onExitCodes", {})
        if code in codes.get("values", ()) and codes["operator"] == "In":
            return rule["action"]
        if disrupted & {one["type"] for one in rule.get("onPodConditions", ())}:
            return rule["action"]
    return "Count"


def now():
    """The time as objects write it."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
