"""Start the composed system, use it, kill its containers under a job, and take it down again.

    python3 tests/faults/composed.py [--train] [--evaluate] [--seed N]

Needs the images of scripts/images_smoke.sh; the standard library is enough. `--train` also trains a
tiny model in the container of the training image. `--evaluate` also has that model, or else the
demo, served by vLLM and asked tasks of HumanEval, whose file lies in the folder BENCHMARKS. Leaves
with 0 when everything held.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from composition import REPOSITORY, System, run, say

TRACES = REPOSITORY / "examples" / "triples.jsonl"
WORKERS = ("anchor", "surprisal")
CRASHES = (*WORKERS, "gateway", "redis", "postgres")
STORES = {"redis", "postgres"}
JOB_S, TRAIN_S, EVALUATE_S = 600, 900, 600
TASKS, BUDGETS = 8, (64, 256)
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
KNOWN = f"""
import gzip, json, pathlib, subprocess, sys
folder = pathlib.Path("/tmp/known")
folder.mkdir()
tasks = [json.loads(line) for line in sys.stdin]
(folder / "HumanEval.jsonl").write_text("".join(json.dumps(task) + "\\n" for task in tasks))
with (folder / "samples.jsonl").open("w") as file:
    for number, task in enumerate(tasks):
        solution = task["canonical_solution"] if number % 2 == 0 else "    return None\\n"
        code = task["prompt"] + solution
        text = "It is easy.</think>\\n```python\\n" + code + "```"
        file.write(json.dumps({{"task_id": task["task_id"], "completion": text}}) + "\\n")
command = ["asap", "eval", "grade", "samples.jsonl", "--benchmark", "humaneval", "--data", "."]
command += ["--extraction", "strict", "--set", "limit={TASKS}", "--out", "out"]
done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
if done.returncode:
    sys.exit(done.stdout + done.stderr)
[row] = json.loads((folder / "out" / "report.json").read_text())["rows"]
print(row["tasks"], row["unscored"], row["accuracy"])
"""
METRICS = """
import urllib.request
with urllib.request.urlopen("http://127.0.0.1:9100/metrics", timeout=10) as reply:
    print(reply.read().decode())
"""


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
    for service in sorted(set(system.services()) - STORES):
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
    """Crash every container once while jobs run, and kill one that stays away for a while."""
    jobs = [job(system, 10)]

    def wait() -> None:
        """Until some moment of a job that is under way."""
        time.sleep(rng.uniform(2, 4))
        if system.phase(jobs[-1]) == "done":
            jobs.append(job(system, 10))

    for victim in rng.sample(CRASHES, len(CRASHES)):
        wait()
        system.crash(victim)
        say(f"crashed {victim}")
    wait()
    victim = rng.choice(WORKERS)
    container = system.container(victim)
    run("docker", "kill", container)
    time.sleep(3)
    run("docker", "start", container)
    say(f"killed {victim}, and started it 3 s later")
    for job_id in jobs:
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


def evaluated(system: System, model: str, tasks: list[str]) -> None:
    """Served, asked and graded, with the evaluation's own containers crashed on the way."""
    chat = {"model": model, "messages": [{"role": "user", "content": "1+1?"}], "max_tokens": 16}
    usage = json.loads(system.request("POST", "/v1/chat/completions", chat))["usage"]
    say(f"{model} answered through the gateway: {usage['completion_tokens']} tokens")
    known = system.python("grade", KNOWN, given="".join(tasks[:TASKS]))
    if known != f"{TASKS} 0 50.0":
        raise SystemExit(f"half of {TASKS} known programs are right, and it said: {known}")
    say(f"graded {TASKS} known programs, half of them right: Pass@1 50.0")
    config = {"benchmarks": ["humaneval"], "limit": TASKS, "budgets": BUDGETS}
    body = {"kind": "evaluate", "model": model, "config": config}
    job_id = json.loads(system.request("POST", "/jobs", body))["id"]
    while (phase := system.phase(job_id)) in ("validating", "queued"):
        time.sleep(0.1)
    for victim in ("vllm", "generate", "grade"):
        system.crash(victim)
        say(f"crashed {victim} under the evaluation, which was {phase}")
        phase = system.phase(job_id)
    state = system.finished(job_id, EVALUATE_S)
    say(f"evaluation {job_id}: {state['phase']}, {state['counts']}")
    rows = json.loads(system.request("GET", f"/jobs/{job_id}/report"))["rows"]
    for row in rows:
        say(
            f"{row['benchmark']}@{row['budget']} {row['extraction']}: {row['tasks']} tasks, Pass@1 "
            f"{row['accuracy']:.1f}, {row['tokens']:.1f} tokens, {row['latency_batch_s']:.2f} s, "
            f"p50 {row['latency_p50_s']:.2f} s"
        )
        held = (row["tasks"], row["unscored"]) == (TASKS, 0)
        if not held or not 0 < row["tokens"] <= row["budget"] or row["latency_p50_s"] <= 0:
            raise SystemExit(json.dumps(row, indent=1))
    if state["phase"] != "done" or len(rows) != 2 * len(BUDGETS):
        raise SystemExit(json.dumps(state))
    sandboxed(system)


def sandboxed(system: System) -> None:
    """The worker's programs ran in its sandbox, in a container without a way out."""
    lines = system.python("grade", METRICS).splitlines()
    metrics = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    level, programs = metrics["asap_sandbox_level"], metrics["asap_sandbox_seconds_count"]
    if float(level) < 1:
        raise SystemExit(f"sandbox level {level}")
    for service in ("grade", "generate", "vllm"):
        if (way := system.python(service, OUTSIDE)) != "closed":
            raise SystemExit(f"the way out of {service} is {way}")
    say(f"sandbox level {level}, {programs} programs since the crash; there is no way out")


def problems() -> list[str]:
    """The lines of HumanEval's file in the folder BENCHMARKS."""
    files = sorted(Path(os.environ.get("BENCHMARKS", "")).glob("HumanEval.jsonl*"))
    if "BENCHMARKS" not in os.environ or not files:
        raise SystemExit("--evaluate: BENCHMARKS must name the folder with HumanEval.jsonl.gz")
    data = files[0].read_bytes()
    text = gzip.decompress(data) if files[0].suffix == ".gz" else data
    return text.decode().splitlines(keepends=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    tasks = problems() if chosen.evaluate else []
    model = "smoke@1" if chosen.train else "demo"
    settings = {
        "SERVED_MODEL": model,
        "ASAP_SERVING__ENDPOINTS": json.dumps({model: ["http://vllm:8000"]}),
    }
    with tempfile.TemporaryDirectory() as folder:
        system = System(Path(folder), settings)
        try:
            system.start(*(["train"] if chosen.train else []))
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
            if chosen.evaluate:
                system.start("evaluate")
                protected(system)
                evaluated(system, model, tasks)
            say("PASSED")
        except BaseException:
            sys.stderr.write(system.logs())
            raise
        finally:
            system.compose("down", "--volumes", "--timeout", "5")


if __name__ == "__main__":
    main()
