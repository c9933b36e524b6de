"""Start the composed system, use it, kill its containers under a job, and take it down again.

    python3 tests/faults/composed.py [--train] [--seed N]

Needs the images of scripts/images_smoke.sh; the standard library is enough. `--train` also trains a
tiny model in the container of the training image. Leaves with 0 when everything held.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TRACES = REPOSITORY / "examples" / "triples.jsonl"
PROJECT = "asap-smoke"
LISTEN = "127.0.0.1:18000"
IMAGE = "asap:0.1.0"
WORKERS = ("anchor", "surprisal")
CRASHES = (*WORKERS, "gateway", "redis", "postgres")
LIST = ("docker", "ps", "--all", "--filter", f"label=com.docker.compose.project={PROJECT}")
STARTED_S, JOB_S, TRAIN_S = 240, 600, 900
TRIPLE = {"question": "2+2?", "cot": "Add.\n\nWait, no.\n\nIt is 4.", "answer": "4"}

PRUNE = f"""
import json, sys, urllib.request
request = urllib.request.Request(
    "http://gateway:8000/prune",
    json.dumps({{"triple": {TRIPLE!r}, "config": {{"max_tokens": 8}}}}).encode(),
    {{"content-type": "application/json", "authorization": "Bearer " + sys.stdin.read()}},
)
with urllib.request.urlopen(request, timeout=60) as reply:
    record = json.load(reply)
    print(reply.status, record["triple"]["answer"], record["pruned_cot"] is not None)
"""
IDENTITY = """
import os, pathlib
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
def refused(path):
    try:
        (pathlib.Path(path) / "x").touch()
    except OSError:
        return True
    return False
print(os.getuid(), int(status["CapEff"], 16), status["NoNewPrivs"].strip(),
      refused("/opt/venv"), refused("/etc"), refused("/"))
"""
OUTSIDE = """
import socket
try:
    socket.create_connection(("1.1.1.1", 443), timeout=3)
except OSError as error:
    print("closed")
else:
    print("open")
"""


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def run(*command: str, given: str | None = None) -> str:
    """Standard output of a command; a failure ends the program with what it said."""
    done = subprocess.run(command, input=given, capture_output=True, text=True, cwd=REPOSITORY)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[:6])} … failed:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


class System:
    """The composed system: its containers by service, and its API."""

    def __init__(self, folder: Path, profiles: list[str]) -> None:
        self._environment = folder / "env"
        run("sh", "deploy/compose/make_env.sh", str(self._environment))
        has_plugin = subprocess.run(["docker", "compose", "version"], capture_output=True)
        program = ["docker", "compose"] if has_plugin.returncode == 0 else ["docker-compose"]
        options = [word for profile in profiles for word in ("--profile", profile)]
        self._compose = [*program, "--env-file", str(self._environment), *options]
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
        return sorted(set(run(*LIST, "--format", form).split()) - {"migrate"})

    def container(self, service: str) -> str:
        named = f"label=com.docker.compose.service={service}"
        return run(*LIST, "--filter", named, "--quiet")

    def inspect(self, service: str) -> dict:
        return json.loads(run("docker", "inspect", self.container(service)))[0]

    def python(self, service: str, source: str, given: str = "") -> str:
        """What a program prints in a service's container."""
        command = ("docker", "exec", "--interactive", self.container(service), "python", "-c")
        return run(*command, source, given=given)

    def start(self) -> None:
        self.compose("up", "--detach", "--no-build")
        deadline = time.monotonic() + STARTED_S
        for service in self.services():
            while (state := self.inspect(service)["State"])["Health"]["Status"] != "healthy":
                if time.monotonic() > deadline:
                    raise SystemExit(f"{service}: {json.dumps(state, indent=1)}")
                time.sleep(1)
        volume = f"{PROJECT}_keys:/keys:ro"
        reader = ("docker", "run", "--rm", "--volume", volume, "--entrypoint", "cat", IMAGE)
        self.key = run(*reader, "/keys/first")

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

    def finished(self, job: str, seconds: float) -> dict:
        deadline = time.monotonic() + seconds
        while True:
            state = json.loads(self.request("GET", f"/jobs/{job}"))
            if state["phase"] in ("done", "cancelled", "expired", "rejected"):
                return state
            if time.monotonic() > deadline:
                raise SystemExit(f"job {job} does not end: {state['phase']} {state['counts']}")
            time.sleep(1)


def protected(system: System) -> None:
    """Every container: not root, read-only, no capabilities, no new privileges, bounded."""
    for service in system.services():
        config = system.inspect(service)
        host = config["HostConfig"]
        held = {
            "user": config["Config"]["User"].split(":")[0] not in ("", "0", "root"),
            "read-only root": host["ReadonlyRootfs"],
            "capabilities": host["CapDrop"] == ["ALL"] and not host["CapAdd"],
            "new privileges": "no-new-privileges:true" in host["SecurityOpt"],
            "memory": host["Memory"] > 0,
            "processes": (host["PidsLimit"] or 0) > 0,
            "privileged": not host["Privileged"],
        }
        if broken := [what for what, holds in held.items() if not holds]:
            raise SystemExit(f"{service} is not protected: {', '.join(broken)}")
    for service in ("gateway", "anchor", "surprisal"):
        found = system.python(service, IDENTITY)
        if found != "10001 0 1 True True True":
            raise SystemExit(f"{service} runs as: {found}")
    say(f"{len(system.services())} containers are not root, read-only, without privileges")


def job(system: System, copies: int) -> str:
    rows = [json.loads(line) for line in TRACES.read_text().splitlines()]
    triples = [
        {
            "id": f"{copy}-{row['id']}",
            "question": f"{copy} {row['question']}",
            "cot": row["cot"],
            "answer": row["answer"],
        }
        for copy in range(copies)
        for row in rows
    ]
    body = {"triples": triples, "config": {"max_tokens": 512}}
    return json.loads(system.request("POST", "/jobs", body))["id"]


def whole(system: System, job_id: str, items: int) -> None:
    """Every item succeeded, once, in the order of the input."""
    state = system.finished(job_id, JOB_S)
    lines = system.request("GET", f"/jobs/{job_id}/result").decode().splitlines()
    ids = [json.loads(line)["triple"]["id"] for line in lines]
    rows = [json.loads(line) for line in TRACES.read_text().splitlines()]
    expected = [f"{copy}-{row['id']}" for copy in range(items // len(rows)) for row in rows]
    say(f"job {job_id}: {state['phase']}, {state['counts']}, {len(ids)} results")
    if state["phase"] != "done" or ids != expected:
        raise SystemExit(f"expected {len(expected)} results in order: {json.dumps(state)}")


def chaos(system: System, rng: random.Random) -> None:
    """Crash every container once while a job runs, and kill one that stays away for a while."""
    job_id = job(system, 10)
    for victim in rng.sample(CRASHES, len(CRASHES)):
        time.sleep(rng.uniform(2, 4))
        system.crash(victim)
        say(f"crashed {victim}")
    victim = rng.choice(WORKERS)
    container = system.container(victim)
    run("docker", "kill", container)
    time.sleep(3)
    run("docker", "start", container)
    say(f"killed {victim}, and started it 3 s later")
    if json.loads(system.request("GET", f"/jobs/{job_id}"))["phase"] == "done":
        raise SystemExit("the job ended before the last kill: nothing was shown")
    whole(system, job_id, 480)


def trained(system: System, pruned: str) -> None:
    """A training run of a few steps on a job's records, in the trainer's container."""
    body = {
        "kind": "train",
        "base": "demo",
        "model": "smoke",
        "job": pruned,
        "config": {"preset": "demo", "max_steps": 4, "gpus": 0},
    }
    job_id = json.loads(system.request("POST", "/jobs", body))["id"]
    state = system.finished(job_id, TRAIN_S)
    model = json.loads(system.request("GET", "/models/smoke"))
    say(f"training {job_id}: {state['phase']}, {state['counts']}, version {model['version']}")
    if state["phase"] != "done" or model["version"] != 1:
        raise SystemExit(json.dumps(state))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    os.environ |= {"COMPOSE_PROJECT_NAME": PROJECT, "LISTEN": LISTEN}
    with tempfile.TemporaryDirectory() as folder:
        system = System(Path(folder), ["train"] if chosen.train else [])
        try:
            began = time.monotonic()
            system.start()
            say(f"healthy after {time.monotonic() - began:.0f} s: {', '.join(system.services())}")
            protected(system)
            answer = system.python("anchor", PRUNE, given=system.key)
            if answer != "200 4 True":
                raise SystemExit(f"POST /prune: {answer}")
            say("POST /prune from inside: 200")
            first = job(system, 1)
            whole(system, first, 48)
            say(f"seed {chosen.seed}")
            chaos(system, random.Random(chosen.seed))
            if chosen.train:
                trained(system, first)
            say("PASSED")
        except BaseException:
            sys.stderr.write(system.logs())
            raise
        finally:
            system.compose("down", "--volumes", "--timeout", "5")


if __name__ == "__main__":
    main()
