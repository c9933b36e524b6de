"""Every role in its own process, on real Redis and PostgreSQL: nothing lost, nothing doubled."""

from __future__ import annotations

import random
import signal
import time

import httpx
import pytest

from cluster import Cluster, results, submit
from engines import redis_server
from openai_server import OpenAIServer, Reply, Status
from waiting import PATIENCE_S

pytestmark = [pytest.mark.contract, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def redis():
    if reason := redis_server.missing():
        pytest.skip(reason)
    with redis_server.serve() as server:
        yield server


@pytest.fixture
def cluster(tmp_path, postgres_server, redis):
    rng, refused = random.Random(0), []

    def answer(prompt, body):
        if rng.random() < 0.1:
            refused.append(prompt)
            return Status(429, retry_after="0")
        return Reply('{"keep": [1, 2, 3]}' if not is_direct(prompt) else "The direct CoT.")

    url = postgres_server.create_database()
    with OpenAIServer(answer) as llm:
        cluster = Cluster(tmp_path, url, redis.url, llm.base_url)
        cluster.llm, cluster.refused = llm, refused
        try:
            cluster.start_all()
            yield cluster
        finally:
            cluster.stop()
    postgres_server.drop_database(url)


def test_a_job_and_a_live_prune_through_five_processes(cluster):
    job = submit(cluster, 40)
    body = {"triple": {"question": "q", "cot": "a b\n\nc d\n\ne f\n\ng", "answer": "x"},
            "config": {"protocol": "select"}, "wait_s": 60}  # fmt: skip
    answer = httpx.post(f"{cluster.url}/prune", json=body, timeout=2 * PATIENCE_S)
    assert answer.status_code == 200, answer.text
    assert answer.json()["kept_steps"] == [0, 1, 2]
    cluster.finished(job)
    records = results(cluster, job)
    assert [record["id"] for record in records] == [str(i) for i in range(40)]
    assert all(record["coarse"]["model"] == "scripted" for record in records)
    for name in ("anchor-1", "surprisal-1", "gateway"):
        assert cluster.signal(name, signal.SIGTERM) == 0, name


def test_killed_workers_a_killed_gateway_and_an_emptied_broker_lose_nothing(cluster, redis):
    job = submit(cluster, 120)
    rng = random.Random(1)
    commands = cluster.commands()
    unsaved = 0  # direct CoTs asked for whose items did not have them yet when a worker died
    for round_, name in enumerate(("anchor-1", "anchor-2", "surprisal-1", "gateway")):
        time.sleep(rng.uniform(0.3, 1.0))
        saved = behind_anchor(cluster, job)
        cluster.signal(name, signal.SIGKILL)
        if name.startswith("anchor"):
            unsaved += len(set(direct_calls(cluster))) - saved
        if round_ == 1:
            redis.restart(empty=True)
        cluster.start(name, *commands[name])
    cluster.wait_ready()
    state = cluster.finished(job)
    assert [(c["status"], c["items"]) for c in state["counts"]] == [("succeeded", 120)]
    assert [record["id"] for record in results(cluster, job)] == [str(i) for i in range(120)]
    calls = direct_calls(cluster)
    assert len(set(calls)) == 120
    refused = sum(map(is_direct, cluster.refused))
    assert len(calls) - 120 - refused <= unsaved, "what an item has is not asked for again"


def is_direct(prompt):
    return "numbered steps" not in prompt


def direct_calls(cluster):
    """One for each item, and again where a reply was refused or lost."""
    return [r.prompt for r in cluster.llm.requests if is_direct(r.prompt)]


def behind_anchor(cluster, job):
    counts = httpx.get(f"{cluster.url}/jobs/{job}", timeout=PATIENCE_S).json()["counts"]
    return sum(count["items"] for count in counts if count["stage"] != "anchor")
