"""Chaos: a job on the process cluster while workers, gateway, broker, database and LLM server fail.

    python tests/faults/chaos.py [ITEMS] [SEED]

Prints the seed, the timeline, the counts and the verdict; a failed run is replayed by its seed.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster import Cluster, results, submit
from engines import postgres, redis_server
from openai_server import Body, OpenAIServer, Reply, Status

KILLS = 12


def faulty_llm(rng: random.Random):
    """429 with and without Retry-After, 500, a slow reply, broken JSON: one call in four."""
    faults = (
        Status(429, retry_after="0"),
        Status(429),
        Status(500),
        Body(b'{"choices": [', "application/json"),
        Reply("The direct CoT.", delay_s=1.0),
    )

    def answer(prompt, body):
        if rng.random() < 0.25:
            return rng.choice(faults)
        return Reply('{"keep": [1, 2, 3]}' if "numbered steps" in prompt else "The direct CoT.")

    return answer


def main(items: int, seed: int) -> int:
    rng = random.Random(seed)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {text}", flush=True)

    say(f"seed {seed}, {items} items")
    with (
        tempfile.TemporaryDirectory() as folder,
        postgres.serve() as database,
        redis_server.serve() as redis,
        OpenAIServer(faulty_llm(rng)) as llm,
    ):
        cluster = Cluster(Path(folder), database.create_database(), redis.url, llm.base_url)
        try:
            cluster.start_all()
            job = submit(cluster, items)
            say(f"job {job} submitted")
            roles = cluster.commands()
            for kill in range(1, KILLS + 1):
                time.sleep(rng.uniform(2, 5))
                name = rng.choice(list(roles))
                cluster.signal(name, signal.SIGKILL)
                cluster.start(name, *roles[name])
                say(f"killed and restarted {name}")
                if kill in (4, 8):
                    redis.restart(empty=True)
                    say("restarted Redis with an empty memory")
                if kill == 6:
                    database.stop()
                    database.start()
                    say("restarted PostgreSQL")
            cluster.wait_ready()
            state = cluster.finished(job, seconds=900)
            say(f"done: {state['counts']}")
            return verdict(cluster, job, items, llm, say)
        finally:
            cluster.stop()


def verdict(cluster, job: str, items: int, llm, say) -> int:
    """Every item exactly once, in input order, as a result or a problem."""
    rows, cursor = [], None
    while True:
        params = {"limit": 500} | ({} if cursor is None else {"cursor": cursor})
        page = httpx.get(f"{cluster.url}/jobs/{job}/items", params=params, timeout=60).json()
        rows += page["items"]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    succeeded = [row["line"] - 1 for row in rows if row["status"] == "succeeded"]
    failed = [row for row in rows if row["status"] == "failed"]
    ids = [int(record["id"]) for record in results(cluster, job)]
    prompts = [(request.prompt, request.body["seed"]) for request in llm.requests]
    codes = sorted({row["problem"]["code"] for row in failed})
    say(f"{len(succeeded)} results, {len(failed)} problems {codes}")
    repeated = len(prompts) - len(set(prompts))
    say(f"{len(prompts)} LLM requests, {repeated} repeated after faults and kills")
    good = len(rows) == items and ids == succeeded and len(succeeded) + len(failed) == items
    say("PASSED: each item exactly once, in input order" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    given = [int(text) for text in sys.argv[1:]]
    sys.exit(main(given[0] if given else 2000, given[1] if len(given) > 1 else 1))
