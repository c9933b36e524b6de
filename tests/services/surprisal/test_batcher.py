from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asap.errors import CapacityError, InvalidInput, Overloaded
from asap.ports import ScoreRequest
from asap_surprisal.batcher import BatchingScorer
from fakes import TableScorer


class Slow(TableScorer):
    """Holds each batch until it is let go."""

    def __init__(self):
        super().__init__(lambda steps: [1.0] * len(steps))
        self.batches = []
        self.gate = asyncio.Event()

    async def score(self, requests):
        self.batches.append(list(requests))
        await self.gate.wait()
        return await super().score(requests)


def request(words, name="q"):
    # the context adds the question and the think mark: two words and the blank line
    return ScoreRequest(name, ("w " * (words - 2),), ("first_token_surprisal",))


async def opened(budget):
    scorer = Slow()
    batching = BatchingScorer(scorer, max_batch_tokens=budget)
    batching.start()
    return scorer, batching


async def settle():
    for _ in range(50):
        await asyncio.sleep(0.001)


async def test_what_waits_while_the_device_works_becomes_the_next_batch():
    scorer, batching = await opened(100)
    calls = [asyncio.create_task(batching.score([request(10, str(i))])) for i in range(6)]
    await settle()
    first = len(scorer.batches[0])
    scorer.gate.set()
    done = await asyncio.gather(*calls)
    assert [len(scores) for scores in done] == [1] * 6
    assert sum(map(len, scorer.batches)) == 6
    assert len(scorer.batches) <= 7 - first
    await batching.stop()


async def test_an_entry_that_does_not_fit_waits_and_is_not_overtaken():
    scorer, batching = await opened(25)
    sizes = (10, 20, 5, 5, 40, 3)
    calls = []
    for i, size in enumerate(sizes):
        calls.append(asyncio.create_task(batching.score([request(size, str(i))])))
        await settle()
    scorer.gate.set()
    await asyncio.gather(*calls)
    order = [int(r.question) for batch in scorer.batches for r in batch]
    assert order == [0, 1, 2, 3, 4, 5]
    assert [[int(r.question) for r in batch] for batch in scorer.batches] == [
        [0],
        [1, 2],
        [3],
        [4],
        [5],
    ]
    await batching.stop()


async def test_a_cancelled_caller_leaves_the_queue():
    scorer, batching = await opened(10)
    calls = [asyncio.create_task(batching.score([request(9, str(i))])) for i in range(3)]
    await settle()
    calls[1].cancel()
    await settle()
    assert batching.waiting_tokens == 9
    scorer.gate.set()
    await asyncio.gather(calls[0], calls[2])
    assert [r.question for batch in scorer.batches for r in batch] == ["0", "2"]
    await batching.stop()


async def test_an_error_of_the_device_reaches_every_caller_of_the_batch_and_the_next_batch_runs():
    class Full(TableScorer):
        calls = 0

        async def score(self, requests):
            self.calls += 1
            if self.calls == 1:
                raise CapacityError("full")
            return await super().score(requests)

    batching = BatchingScorer(Full(lambda steps: [1.0]), max_batch_tokens=100)
    batching.start()
    with pytest.raises(CapacityError):
        await batching.score([request(5)])
    assert len(await batching.score([request(5)])) == 1
    await batching.stop()


async def test_stopping_cancels_those_who_wait():
    _, batching = await opened(10)
    calls = [asyncio.create_task(batching.score([request(9)])) for _ in range(3)]
    await settle()
    await batching.stop()  # one is on the device
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)


async def test_who_comes_after_the_end_is_cancelled_too():
    scorer, batching = await opened(10)
    calls = [asyncio.create_task(batching.score([request(9)])) for _ in range(6)]
    await settle()
    assert batching.waiting_tokens == 18  # one is on the device, two wait inside, three outside
    await batching.stop()
    calls += [asyncio.create_task(batching.score_or_refuse([request(9)]))]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError] * 7
    assert (batching.waiting_tokens, len(scorer.batches)) == (0, 1)


async def test_a_full_queue_keeps_stages_at_the_door_and_lets_them_in_by_turns():
    scorer, batching = await opened(10)
    calls = [asyncio.create_task(batching.score([request(6, str(i))])) for i in range(8)]
    await settle()
    assert batching.waiting_tokens == 18
    calls[5].cancel()  # one of those outside
    scorer.gate.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [i for i, result in enumerate(results) if isinstance(result, BaseException)] == [5]
    order = [int(r.question) for batch in scorer.batches for r in batch]
    assert order == [0, 1, 2, 3, 4, 6, 7]
    assert batching.waiting_tokens == 0
    await batching.stop()


async def test_who_can_come_back_is_refused_while_the_queue_is_full():
    scorer, batching = await opened(10)
    calls = [asyncio.create_task(batching.score([request(9, str(i))])) for i in range(3)]
    await settle()
    calls.append(asyncio.create_task(batching.score_or_refuse([request(9, "3")])))
    await settle()
    assert batching.waiting_tokens == 27
    with pytest.raises(Overloaded) as refused:
        await batching.score_or_refuse([request(3)])
    assert 1 <= refused.value.context["retry_after_s"] <= 360
    scorer.gate.set()
    await asyncio.gather(*calls)
    assert await batching.score_or_refuse([request(3)])
    await batching.stop()


@pytest.mark.parametrize("sizes", [(11,), (3, 11), (8, 8, 8)])
async def test_what_the_queue_would_never_take_is_refused_as_too_long(sizes):
    scorer, batching = await opened(10)
    with pytest.raises(InvalidInput) as refused:
        await batching.score_or_refuse([request(size) for size in sizes])
    assert refused.value.problem_code == "text-too-long"
    assert (batching.waiting_tokens, scorer.batches) == (0, [])
    await batching.stop()


@given(
    callers=st.lists(
        st.tuples(st.integers(3, 30), st.integers(0, 3), st.booleans()), min_size=1, max_size=20
    ),
    budget=st.integers(5, 60),
)
async def test_the_laws_hold_whoever_comes_and_goes(callers, budget):
    scorer, batching = await opened(budget)
    scorer.gate.set()
    tasks = []
    for i, (size, pauses, _) in enumerate(callers):
        tasks.append(asyncio.create_task(batching.score([request(size, str(i))])))
        for _ in range(pauses):
            await asyncio.sleep(0)
        inside = [entry.tokens for entry in batching._waiting]
        assert batching.waiting_tokens == sum(inside)
        assert batching.waiting_tokens <= batching.max_waiting_tokens or len(inside) == 1
    gone = {i for i, (_, _, leaves) in enumerate(callers) if leaves and tasks[i].cancel()}
    results = await asyncio.gather(*tasks, return_exceptions=True)
    kept = [i for i in range(len(callers)) if i not in gone]
    assert all(isinstance(results[i], list) for i in kept), "nobody is lost"
    batches = [[int(r.question) for r in batch] for batch in scorer.batches]
    for batch in batches:
        assert sum(callers[i][0] for i in batch) <= budget or len(batch) == 1
    scored = [i for batch in batches for i in batch]
    assert len(scored) == len(set(scored))
    assert set(kept) <= set(scored)
    assert batching.waiting_tokens == 0
    await batching.stop()
