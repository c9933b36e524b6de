from __future__ import annotations

import asyncio
import threading

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
        self.turns = self.now = self.most = 0

    async def score(self, requests):
        self.batches.append([request.question for request in requests])
        self.now += 1
        self.most = max(self.most, self.now)
        await self.gate.wait()
        for _ in range(self.turns):
            await asyncio.sleep(0)
        self.now -= 1
        return await super().score(requests)


def request(words, name="q"):
    # the context adds the question and the think mark: two words and the blank line
    return ScoreRequest(name, ("w " * (words - 2),), ("first_token_surprisal",))


async def opened(budget, **options):
    scorer = Slow()
    batching = Batching(scorer, max_batch_tokens=budget, **options)
    batching.start()
    return scorer, batching


class Batching(BatchingScorer):
    """Knows how many callers are still in the threads that tokenise."""

    def __init__(self, scorer, **options):
        super().__init__(scorer, **options)
        self.tokenizing = 0

    async def _tokenized(self, requests):
        self.tokenizing += 1
        try:
            return await super()._tokenized(requests)
        finally:
            self.tokenizing -= 1


async def settle(batching):
    """Until everybody is where they wait: what follows tokenisation needs turns of the loop."""
    for turns in (5, 50):
        for _ in range(turns):
            await asyncio.sleep(0)
        while batching.tokenizing:  # noqa: ASYNC110 - a number, not an event
            await asyncio.sleep(0.001)


async def come(batching, *sizes):
    """Callers by number, each of whom is where it waits before the next one comes."""
    calls = []
    for i, size in enumerate(sizes):
        calls.append(asyncio.create_task(batching.score([request(size, str(i))])))
        await settle(batching)
    return calls


async def test_two_batches_are_with_the_scorer_and_the_rest_becomes_the_next_one():
    scorer, batching = await opened(100)
    calls = await come(batching, *[10] * 6)
    assert scorer.batches == [["0"], ["1"]]
    assert batching.waiting_tokens == 40
    scorer.gate.set()
    assert [len(scores) for scores in await asyncio.gather(*calls)] == [1] * 6
    assert scorer.batches == [["0"], ["1"], ["2", "3", "4", "5"]]
    await batching.stop()


async def test_an_entry_that_does_not_fit_waits_and_is_not_overtaken():
    scorer, batching = await opened(25)
    calls = await come(batching, 10, 20, 5, 5, 40, 3)
    scorer.gate.set()
    await asyncio.gather(*calls)
    assert scorer.batches == [["0"], ["1"], ["2", "3"], ["4"], ["5"]]
    await batching.stop()


async def test_a_cancelled_caller_leaves_the_queue():
    scorer, batching = await opened(10)
    calls = await come(batching, 9, 9, 9, 9)
    assert batching.waiting_tokens == 18
    calls[2].cancel()
    await settle(batching)
    assert batching.waiting_tokens == 9
    scorer.gate.set()
    await asyncio.gather(*calls, return_exceptions=True)
    assert scorer.batches == [["0"], ["1"], ["3"]]
    await batching.stop()


async def test_an_error_reaches_every_caller_of_the_batch_and_the_next_batch_runs():
    class Broken(Slow):
        async def score(self, requests):
            scores = await super().score(requests)
            if len(requests) > 1:
                raise RuntimeError("planted")
            return scores

    scorer = Broken()
    batching = Batching(scorer, max_batch_tokens=100)
    batching.start()
    calls = await come(batching, 5, 5, 5, 5)
    scorer.gate.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [list, list, RuntimeError, RuntimeError]
    assert len(await batching.score([request(5)])) == 1
    await batching.stop()


async def test_a_lack_of_memory_is_told_to_those_alone_who_cause_it():
    class Full(Slow):
        async def score(self, requests):
            scores = await super().score(requests)
            if any(request.question == "3" for request in requests):
                raise CapacityError("full")
            return scores

    scorer = Full()
    batching = Batching(scorer, max_batch_tokens=100)
    batching.start()
    calls = await come(batching, *[5] * 5)
    scorer.gate.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [list, list, list, CapacityError, list]
    assert scorer.batches[2:] == [["2", "3", "4"], ["2"], ["3"], ["4"]]
    await batching.stop()


class Stepped(Slow):
    """Ends one batch whenever it is told so."""

    def __init__(self):
        super().__init__()
        self.gate.set()
        self.steps = asyncio.Semaphore(0)

    async def score(self, requests):
        scores = await super().score(requests)
        await self.steps.acquire()
        return scores


@pytest.mark.parametrize("size", [19, 50])
async def test_callers_who_never_stop_coming_overtake_who_waits_at_the_door_a_bounded_time(size):
    scorer, calls = Stepped(), []
    batching = Batching(scorer, max_batch_tokens=10)
    batching.start()

    async def fill():
        """Small callers, who are refused when there is no room, until one of them is."""
        while not (calls and calls[-1].done() and calls[-1].exception()):
            name = f"small {len(calls)}"
            calls.append(asyncio.create_task(batching.score_or_refuse([request(3, name)])))
            while not calls[-1].done() and name not in inside(batching) | served(scorer):  # noqa: ASYNC110
                await asyncio.sleep(0.0005)
        assert isinstance(calls.pop().exception(), Overloaded)

    await fill()
    large = asyncio.create_task(batching.score([request(size, "large")]))
    await settle(batching)
    assert "large" not in inside(batching)
    before = len(calls)
    while "large" not in served(scorer):
        scorer.steps.release()
        await settle(batching)
        await fill()
        assert len(calls) < 100, "it waits for ever"
    order = [name for batch in scorer.batches for name in batch]
    overtakers = set(order[: order.index("large")]) - {f"small {i}" for i in range(before)}
    # as many as the queue holds go past it, and the one whose coming lets it in
    assert 0 < len(overtakers) <= batching.max_waiting_tokens // 3 + 1
    for _ in range(100):
        scorer.steps.release()
    await asyncio.gather(large, *calls)
    await batching.stop()


def inside(batching):
    return {entry.prepared.request.question for entry in batching._waiting}


def served(scorer):
    return {name for batch in scorer.batches for name in batch}


async def test_stopping_cancels_those_who_wait():
    _, batching = await opened(10)
    calls = await come(batching, 9, 9, 9)  # two are on the device
    await batching.stop()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)


async def test_who_comes_after_the_end_is_cancelled_too():
    scorer, batching = await opened(10)
    calls = await come(batching, *[9] * 6)
    assert batching.waiting_tokens == 18  # two are on the device, two wait inside, two outside
    await batching.stop()
    calls += [asyncio.create_task(batching.score_or_refuse([request(9)]))]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError] * 7
    assert (batching.waiting_tokens, len(scorer.batches)) == (0, 2)


async def test_a_full_queue_keeps_stages_at_the_door_and_lets_them_in_by_turns():
    scorer, batching = await opened(10)
    calls = await come(batching, *[6] * 8)
    assert batching.waiting_tokens == 18
    calls[5].cancel()  # one of those outside
    scorer.gate.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [i for i, result in enumerate(results) if isinstance(result, BaseException)] == [5]
    assert scorer.batches == [["0"], ["1"], ["2"], ["3"], ["4"], ["6"], ["7"]]
    assert batching.waiting_tokens == 0
    await batching.stop()


async def test_who_can_come_back_is_refused_while_the_queue_is_full():
    scorer, batching = await opened(10)
    calls = await come(batching, 9, 9, 9, 9)
    calls.append(asyncio.create_task(batching.score_or_refuse([request(9, "4")])))
    await settle(batching)
    assert batching.waiting_tokens == 27
    with pytest.raises(Overloaded) as refused:
        await batching.score_or_refuse([request(3)])
    assert 1 <= refused.value.context["retry_after_s"] <= 360
    scorer.gate.set()
    await asyncio.gather(*calls)
    assert await batching.score_or_refuse([request(3)])
    await batching.stop()


@pytest.mark.parametrize("sizes", [(16,), (3, 16), (8, 8, 8)])
async def test_what_the_queue_would_never_take_is_refused_as_too_long(sizes):
    scorer, batching = await opened(10, max_text_tokens=15)
    with pytest.raises(InvalidInput) as refused:
        await batching.score_or_refuse([request(size) for size in sizes])
    assert refused.value.problem_code == "text-too-long"
    assert (batching.waiting_tokens, scorer.batches) == (0, [])
    await batching.stop()


@pytest.mark.parametrize(("longest", "size"), [(15, 15), (None, 1000)])
async def test_a_text_longer_than_a_batch_is_taken_where_the_scorer_can_hold_it(longest, size):
    scorer, batching = await opened(10, max_text_tokens=longest)
    scorer.gate.set()
    assert len(await batching.score_or_refuse([request(size)])) == 1
    assert scorer.batches == [["q"]]
    await batching.stop()


async def test_busy_threads_of_the_loop_hold_nobody_up():
    scorer, batching = await opened(10)
    scorer.gate.set()
    end, loop = threading.Event(), asyncio.get_running_loop()
    busy = [loop.run_in_executor(None, end.wait) for _ in range(64)]
    assert len(await batching.score([request(5)])) == 1
    assert not any(one.done() for one in busy)
    end.set()
    await asyncio.gather(*busy)
    await batching.stop()


async def test_what_the_scorer_offers_is_passed_on():
    scorer, batching = await opened(10)
    scorer.offers = frozenset({"mean_surprisal"})
    assert batching.offers == {"mean_surprisal"}
    await batching.stop()


async def test_each_scored_batch_is_reported_before_its_callers_hear():
    seen = []
    scorer, batching = await opened(10, after_batch=lambda: seen.append(scorer.now))
    scorer.gate.set()
    await batching.score([request(5)])
    assert seen == [0]
    await batching.stop()


class Recording(Batching):
    """Remembers who entered the queue, in order."""

    def __init__(self, scorer, **options):
        super().__init__(scorer, **options)
        self.entered = []

    def _enter(self, entry):
        self.entered.append(entry.prepared.request.question)
        super()._enter(entry)


@given(
    callers=st.lists(
        st.tuples(st.integers(3, 30), st.integers(0, 3), st.none() | st.integers(0, 19)),
        min_size=1,
        max_size=20,
    ),
    budget=st.integers(5, 60),
    turns=st.integers(0, 4),
)
async def test_the_laws_hold_whoever_comes_and_goes(callers, budget, turns):
    scorer = Slow()
    scorer.turns = turns
    scorer.gate.set()
    batching = Recording(scorer, max_batch_tokens=budget)
    batching.start()
    tasks, gone = [], set()
    for i, (size, pauses, leaves) in enumerate(callers):
        tasks.append(asyncio.create_task(batching.score([request(size, str(i))])))
        for _ in range(pauses):
            await asyncio.sleep(0.0005 * pauses)
        inside = [entry.tokens for entry in batching._waiting]
        assert batching.waiting_tokens == sum(inside)
        assert batching.waiting_tokens <= batching.max_waiting_tokens or len(inside) == 1
        if leaves is not None and leaves <= i and tasks[leaves].cancel():
            gone.add(leaves)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    kept = [i for i in range(len(callers)) if i not in gone]
    assert all(isinstance(results[i], list) for i in kept), "nobody is lost"
    for batch in scorer.batches:
        assert sum(callers[int(name)][0] for name in batch) <= budget or len(batch) == 1
    scored = [name for batch in scorer.batches for name in batch]
    assert len(scored) == len(set(scored))
    assert {str(i) for i in kept} <= set(scored)
    assert scored == [name for name in batching.entered if name in scored], "nobody is overtaken"
    assert scorer.most <= 2
    assert batching.waiting_tokens == 0
    await batching.stop()
