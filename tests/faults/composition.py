"""The composed system: containers by service, and its API. For tests/faults/composed.py."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

__all__ = ["IMAGE", "REPOSITORY", "System", "run", "say"]

REPOSITORY = Path(__file__).parents[2]
PROJECT = "asap-smoke"
LISTEN = "127.0.0.1:18000"
IMAGE = "asap:0.1.0"
LIST = ("docker", "ps", "--all", "--filter", f"label=com.docker.compose.project={PROJECT}")
ENDING = ("migrate", "weights")
"""Services whose containers do their work and end."""
STARTED_S = 600


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def run(*command: str, given: str | None = None) -> str:
    """Standard output of a command; a failure ends the program with what it said."""
    done = subprocess.run(command, input=given, capture_output=True, text=True, cwd=REPOSITORY)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[:6])} … failed:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


class System:
    """The composed system.

    Args:
        folder: for its secrets.
        settings: of docker-compose.yml, beside the secrets.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        environment = folder / "env"
        run("sh", "deploy/compose/make_env.sh", str(environment))
        os.environ |= {"COMPOSE_PROJECT_NAME": PROJECT, "LISTEN": LISTEN, **settings}
        has_plugin = subprocess.run(["docker", "compose", "version"], capture_output=True)
        program = ["docker", "compose"] if has_plugin.returncode == 0 else ["docker-compose"]
        self._compose = [*program, "--env-file", str(environment)]
        self.key = ""

    def compose(self, *command: str) -> str:
        return run(*self._compose, *command)

    def logs(self) -> str:
        """The last lines of every container."""
        command = [*self._compose, "logs", "--tail", "40"]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY).stdout

    def services(self) -> list[str]:
        """Those that stay."""
        form = '{{.Label "com.docker.compose.service"}}'
        return sorted(set(run(*LIST, "--format", form).split()) - set(ENDING))

    def container(self, service: str) -> str:
        named = f"label=com.docker.compose.service={service}"
        return run(*LIST, "--filter", named, "--quiet")

    def inspect(self, service: str) -> dict:
        return json.loads(run("docker", "inspect", self.container(service)))[0]

    def python(self, service: str, source: str, given: str = "") -> str:
        """What a program prints in a service's container."""
        command = ("docker", "exec", "--interactive", self.container(service), "python", "-c")
        return run(*command, source, given=given)

    def start(self, *profiles: str) -> None:
        """Bring up what these profiles add to what runs, and wait until everything is healthy."""
        began = time.monotonic()
        self._compose += [word for profile in profiles for word in ("--profile", profile)]
        self.compose("up", "--detach", "--no-build")
        for service in self.services():
            while (state := self.inspect(service)["State"])["Health"]["Status"] != "healthy":
                if time.monotonic() > began + STARTED_S:
                    raise SystemExit(f"{service}: {json.dumps(state, indent=1)}")
                time.sleep(1)
        volume = f"{PROJECT}_keys:/keys:ro"
        reader = ("docker", "run", "--rm", "--volume", volume, "--entrypoint", "cat", IMAGE)
        self.key = run(*reader, "/keys/first")
        say(f"healthy after {time.monotonic() - began:.0f} s: {', '.join(self.services())}")

    def crash(self, service: str) -> None:
        """End a container as a crash does: after `docker kill` no restart policy would act."""
        pid = str(self.inspect(service)["State"]["Pid"])
        killer = ("docker", "run", "--rm", "--pid", "host", "--user", "0", "--entrypoint", "sh")
        run(*killer, IMAGE, "-c", f"kill -KILL {pid}")

    def request(self, method: str, path: str, body: object = None) -> bytes:
        """An answer's body. A server that is away is asked again, as clients do."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        if method == "POST":
            headers["idempotency-key"] = random.randbytes(16).hex()
        request = urllib.request.Request(
            f"http://{LISTEN}{path}", data, headers=headers, method=method
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(request, timeout=30) as reply:
                    return reply.read()
            except urllib.error.HTTPError as error:
                answer = error.read().decode(errors="replace")
                if error.code not in (429, 503) or time.monotonic() > deadline:
                    raise SystemExit(f"{method} {path}: {error.code} {answer}") from error
            except OSError as error:
                if time.monotonic() > deadline:
                    raise SystemExit(f"{method} {path}: {error}") from error
            time.sleep(1)

    def phase(self, job: str) -> str:
        return json.loads(self.request("GET", f"/jobs/{job}"))["phase"]

    def finished(self, job: str, seconds: float) -> dict:
        deadline = time.monotonic() + seconds
        while True:
            state = json.loads(self.request("GET", f"/jobs/{job}"))
            if state["phase"] in ("done", "cancelled", "expired", "rejected"):
                return state
            if time.monotonic() > deadline:
                raise SystemExit(f"job {job} does not end: {state['phase']} {state['counts']}")
            time.sleep(1)
