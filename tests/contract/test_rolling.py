"""Two processes of every role; each is asked to stop and started again while clients call.

The contract of a client: the same request with the same Idempotency-Key is sent again, to any
gateway, after a broken connection, a 409 `idempotency-in-progress`, a 429 or a 503; a 202 is
followed to its Location.
"""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count, takewhile

import httpx
import pytest

from cluster import Cluster, results, submit
from engines import redis_server
from openai_server import OpenAIServer, Reply
from waiting import PATIENCE_S

pytestmark = [pytest.mark.contract, pytest.mark.slow, pytest.mark.timeout(400)]

CLIENTS = 4
JOB = 300


@pytest.fixture
def cluster(tmp_path, postgres_server):
    if reason := redis_server.missing():
        pytest.skip(reason)

    def answer(prompt, body):
        return Reply(
            '{"keep": [1, 2, 3]}' if "numbered steps" in prompt else "The direct CoT.", delay_s=0.05
        )

    url = postgres_server.create_database()
    with redis_server.serve() as redis, OpenAIServer(answer) as llm:
        cluster = Cluster(tmp_path, url, redis.url, llm.base_url, gateways=2)
        try:
            cluster.start_all()
            for address in cluster.urls:
                cluster.wait_ready(address)
            yield cluster
        finally:
            cluster.stop()
    postgres_server.drop_database(url)


class Client:
    """One caller that keeps to the contract, and what it went through."""

    def __init__(self, urls, name):
        self.urls, self.name = urls, name
        self.answered, self.repeated, self.refused = [], 0, []

    def call(self, number):
        cot = f"first {number} by {self.name}\n\nsecond\n\nthird\n\nfourth"
        body = {
            "triple": {"id": f"{self.name}-{number}", "question": "q", "cot": cot, "answer": "x"},
            "config": {"protocol": "select"},
        }
        headers = {"Idempotency-Key": f"{self.name}-{number}"}
        ends = time.monotonic() + 3 * PATIENCE_S  # a key of a request that died is held for 120 s
        for attempt in takewhile(lambda _: time.monotonic() < ends, count()):
            url = self.urls[(number + attempt) % len(self.urls)]
            try:
                answer = httpx.post(f"{url}/prune", json=body, headers=headers, timeout=60)
            except httpx.TransportError:
                answer = None
            if answer is not None and answer.status_code == 200:
                self.answered.append(answer.json()["id"])
                return
            if answer is not None and answer.status_code == 202:
                self.answered.append(self._follow(answer.headers["Location"]))
                return
            if answer is not None and answer.status_code not in (409, 429, 503):
                self.refused.append((answer.status_code, answer.text))
                return
            self.repeated += 1
            time.sleep(0.2)
        self.refused.append((number, "never answered"))

    def _follow(self, location):
        ends = time.monotonic() + 2 * PATIENCE_S
        for attempt in takewhile(lambda _: time.monotonic() < ends, count()):
            try:
                text = httpx.get(f"{self.urls[attempt % 2]}{location}/result", timeout=60).text
            except httpx.TransportError:
                text = ""
            if text.strip():
                return httpx.Response(200, text=text).json()["id"]
            time.sleep(0.2)
        return "never"


def test_rolling_restarts_fail_no_request_that_keeps_to_the_contract(cluster):
    job = submit(cluster, JOB)
    stopped = threading.Event()
    clients = [Client(cluster.urls, f"c{i}") for i in range(CLIENTS)]

    def call_until_stopped(client):
        for number in count():
            if number > 1 and stopped.is_set():
                return number
            client.call(number)

    with ThreadPoolExecutor(CLIENTS) as pool:
        calls = [pool.submit(call_until_stopped, client) for client in clients]
        try:
            for name, command in cluster.commands().items():
                time.sleep(0.5)
                assert cluster.signal(name, signal.SIGTERM) == 0, name
                cluster.start(name, *command)
                if name.startswith("gateway"):
                    cluster.wait_ready(cluster.urls[list(cluster.commands()).index(name)])
        finally:
            stopped.set()
        made = sum(call.result() for call in calls)

    assert [client.refused for client in clients] == [[]] * CLIENTS
    answered = [record for client in clients for record in client.answered]
    assert len(answered) == made > CLIENTS
    assert len(set(answered)) == made  # each of its own request
    state = cluster.finished(job)
    assert [(c["status"], c["items"]) for c in state["counts"]] == [("succeeded", JOB)]
    assert [record["id"] for record in results(cluster, job)] == [str(i) for i in range(JOB)]
    # a request that was sent twice began one job
    assert _jobs(cluster.url) == made + 1


def _jobs(url):
    total, cursor = 0, None
    while True:
        params = {"limit": 500} | ({"cursor": cursor} if cursor else {})
        page = httpx.get(f"{url}/jobs", params=params, timeout=60).json()
        total += len(page["jobs"])
        cursor = page["next_cursor"]
        if cursor is None:
            return total
