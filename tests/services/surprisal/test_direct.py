from __future__ import annotations

import asyncio

import pytest

from asap.errors import Overloaded
from asap.ports import ScoreRequest
from asap_surprisal.direct import DirectScorer
from fakes import TableScorer

REQUEST = ScoreRequest("q", ("one", "two"), ("first_token_surprisal",))


class Server(TableScorer):
    """Answers when it is let."""

    def __init__(self):
        super().__init__(lambda steps: [float(len(step)) for step in steps])
        self.gate = asyncio.Event()
        self.asked = 0

    async def score(self, requests):
        self.asked += len(requests)
        await self.gate.wait()
        return await super().score(requests)

    async def is_asked(self, texts):
        while self.asked < texts:  # noqa: ASYNC110 - a number, not an event
            await asyncio.sleep(0.001)


async def calls_of(direct, number):
    calls = [asyncio.create_task(direct.score([REQUEST])) for _ in range(number)]
    await direct._scorer.is_asked(number)
    return calls


async def test_every_call_goes_out_at_once_and_comes_back_in_order():
    server = Server()
    direct = DirectScorer(server, max_inside=8)
    calls = await calls_of(direct, 5)
    server.gate.set()
    expected = await server.score([REQUEST])
    assert await asyncio.gather(*calls) == [expected] * 5
    longer = ScoreRequest("q", ("longer step",), ("first_token_surprisal",))
    first, second = await direct.score([longer, REQUEST])
    assert first.scores["first_token_surprisal"] == (11.0,)
    assert [second] == expected
    await direct.stop()


async def test_who_can_come_back_is_refused_while_enough_are_inside():
    server = Server()
    direct = DirectScorer(server, max_inside=2)
    calls = await calls_of(direct, 2)
    with pytest.raises(Overloaded) as refused:
        await direct.score_or_refuse([REQUEST])
    assert 1 <= refused.value.context["retry_after_s"] <= 360
    stage = asyncio.create_task(direct.score([REQUEST]))  # its items are already claimed
    await server.is_asked(3)
    server.gate.set()
    await asyncio.gather(*calls, stage)
    assert len(await direct.score_or_refuse([REQUEST])) == 1
    await direct.stop()


async def test_who_goes_away_makes_room():
    server = Server()
    direct = DirectScorer(server, max_inside=2)
    calls = await calls_of(direct, 2)
    calls[0].cancel()
    await asyncio.wait({calls[0]})
    calls[0] = asyncio.create_task(direct.score_or_refuse([REQUEST]))
    await server.is_asked(3)
    server.gate.set()
    assert [len(scores) for scores in await asyncio.gather(*calls)] == [1, 1]
    await direct.stop()


async def test_stopping_cancels_those_who_wait_and_those_who_come_later():
    direct = DirectScorer(Server(), max_inside=8)
    calls = await calls_of(direct, 3)
    await direct.stop()
    calls.append(asyncio.create_task(direct.score_or_refuse([REQUEST])))
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError] * 4


async def test_it_is_the_scorer_behind_it_to_everybody():
    server = Server()
    server.offers = frozenset({"mean_surprisal"})
    direct = DirectScorer(server, max_inside=1)
    assert (direct.name, direct.tokenizer_name) == ("table", "words")
    assert (direct.offers, direct.count("two words")) == ({"mean_surprisal"}, 2)
    await direct.stop()
