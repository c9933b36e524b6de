"""Idempotency keys, on every database."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from asap_runtime.idempotency import First, InProgress, Mismatch, Replay
from job_store import TENANT, remember


def test_the_first_works_and_the_others_hear_its_answer(platform):
    keys = platform.keys
    assert keys.remember(TENANT, "k", "h") == First()
    assert keys.remember(TENANT, "k", "h") == InProgress(None)
    assert keys.remember(TENANT, "k", "other") == Mismatch()
    assert keys.remember("b", "k", "other") == First()
    keys.store_response(TENANT, "k", 201, b'{"id":1}')
    assert keys.remember(TENANT, "k", "h") == Replay(201, b'{"id":1}')
    assert keys.remember(TENANT, "k", "other") == Mismatch()


def test_a_refused_request_may_be_repeated(platform):
    platform.keys.remember(TENANT, "k", "h")
    platform.keys.forget(TENANT, "k")
    assert platform.keys.remember(TENANT, "k", "other") == First()
    platform.keys.store_response(TENANT, "k", 200, b"")
    platform.keys.forget(TENANT, "k")  # an answer that was given stays
    assert platform.keys.remember(TENANT, "k", "other") == Replay(200, b"")


def test_keys_are_kept_for_a_day(platform):
    for key in ("k", "l", "m"):
        platform.keys.remember(TENANT, key, "h")
        platform.keys.store_response(TENANT, key, 200, b"")
    platform.pass_time(23 * 3600)
    assert platform.keys.forget_old(10) == 0
    assert platform.keys.remember(TENANT, "k", "h") == Replay(200, b"")
    platform.pass_time(3601)
    assert platform.keys.remember(TENANT, "k", "other") == First()
    assert [platform.keys.forget_old(1) for _ in range(3)] == [1, 1, 0]
    assert platform.keys.remember(TENANT, "k", "other") == InProgress(None)


def test_a_dead_request_that_made_nothing_is_taken_over_once(platform):
    platform.keys.remember(TENANT, "k", "h")
    platform.keys.remember(TENANT, "with a job", "h")
    job_id = platform.job(idempotency_key="with a job")
    platform.pass_time(121)
    assert platform.keys.remember(TENANT, "k", "other") == Mismatch()
    assert platform.keys.remember(TENANT, "k", "h") == First()
    assert platform.keys.remember(TENANT, "k", "h") == InProgress(None)
    assert platform.keys.remember(TENANT, "with a job", "h") == InProgress(job_id)


def test_of_eight_threads_one_is_first(platform):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: platform.keys.remember(TENANT, "k", "h"), range(8)))
    assert Counter(answers) == {First(): 1, InProgress(None): 7}


def test_of_four_processes_one_is_first(database, database_url, racers):
    runs = [racers.submit(remember, database_url, TENANT, "k", "h") for _ in range(4)]
    assert Counter(run.result() for run in runs) == {"First": 1, "InProgress": 3}
