from __future__ import annotations

import asyncio

import pytest

from asap.config import PruneConfig
from asap.errors import InvalidInput, UpstreamError, UpstreamUnavailable
from asap.ports import ChatResult, Sampling
from asap.types import Record, Triple
from asap_runtime.pipeline import CHUNK, prune, prune_stream
from fakes import ScriptedChat, TableScorer, said
from waiting import PATIENCE_S

SCORER = TableScorer(lambda steps: [float(len(step)) for step in steps])


def triples(count):
    return [
        Triple(
            id=str(i), question=f"q{i}", cot="step one here\n\nstep two\n\nand three", answer="a"
        )
        for i in range(count)
    ]


def reply(prompt):
    return '{"keep": [1, 3]}' if "numbered" in prompt else "the direct cot"


async def test_prunes_a_list_with_both_engines_in_input_order():
    config = PruneConfig(protocol="select", max_tokens=4)
    done = await prune(triples(40), config, chat=ScriptedChat(answer=reply), scorer=SCORER)
    assert [record.id for record in done] == [str(i) for i in range(40)]
    assert {record.kept_steps for record in done} == {(0,)}
    assert all(record.tokens.pruned == 3 for record in done)


@pytest.mark.parametrize("method", ["asap_stage1", "direct", "original"])
async def test_methods_without_a_scorer_are_counted(method):
    records = [
        Record(triple=t, config=PruneConfig(method=method, protocol="select")) for t in triples(3)
    ]
    chat = ScriptedChat(answer=reply)
    stream = prune_stream(records, chat=chat, scorer=None, counter=SCORER)
    outcomes = [outcome async for outcome in stream]
    assert all(outcome.record.tokens.pruned > 0 for outcome in outcomes)


async def test_a_missing_engine_is_named():
    with pytest.raises(InvalidInput, match="needs an LLM"):
        await prune(triples(1), PruneConfig(), scorer=SCORER)
    with pytest.raises(InvalidInput, match="needs a scorer"):
        await prune(triples(1), PruneConfig(method="asap_stage2"))


async def test_an_error_of_one_record_is_its_outcome():
    class Picky(ScriptedChat):
        async def complete(self, prompt: str, sampling: Sampling) -> ChatResult:
            if "q3\n" in prompt:
                raise UpstreamError("400: context length", status=400)
            return said(reply(prompt))

    records = [Record(triple=t, config=PruneConfig(protocol="select")) for t in triples(CHUNK + 2)]
    outcomes = [o async for o in prune_stream(records, chat=Picky(), scorer=SCORER)]
    assert [o.position for o in outcomes if o.error] == [3]
    assert len(outcomes) == CHUNK + 2


@pytest.mark.parametrize(
    "error", [UpstreamUnavailable("gone"), UpstreamError("401", status=401)], ids=["gone", "key"]
)
async def test_an_error_that_would_meet_all_stops_the_run_and_its_calls(error):
    class Broken(ScriptedChat):
        async def complete(self, prompt: str, sampling: Sampling) -> ChatResult:
            if "q5\n" in prompt:
                raise error
            await asyncio.sleep(0 if "q0\n" in prompt else 3600)
            return said(reply(prompt))

    records = [Record(triple=t, config=PruneConfig(protocol="select")) for t in triples(200)]
    stream = prune_stream(records[5:], chat=Broken(), scorer=SCORER)
    with pytest.raises(type(error)):
        await asyncio.wait_for(anext(stream), PATIENCE_S)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_rejected_records_come_with_their_reason():
    config = PruneConfig(protocol="select", on_fail="drop", max_attempts=2)
    chat = ScriptedChat(answer=lambda prompt: "nothing")
    records = [Record(triple=t, config=config) for t in triples(1)]
    [outcome] = [o async for o in prune_stream(records, chat=chat, scorer=SCORER)]
    assert outcome.error.problem_code == "coarse-exhausted"
    assert "2 attempts" in outcome.error.detail
    assert outcome.record.status == "rejected"


async def test_input_is_read_only_so_far_ahead():
    read = 0

    def feed():
        nonlocal read
        for triple in triples(400):
            read += 1
            yield Record(triple=triple, config=PruneConfig(method="asap_stage2", max_tokens=4))

    stream = prune_stream(feed(), chat=None, scorer=SCORER, concurrency=CHUNK)
    await anext(stream)
    assert read <= 3 * CHUNK
    await stream.aclose()


async def test_stage_one_goes_on_while_stage_two_scores():
    in_flight = []

    class Slow(TableScorer):
        async def score(self, requests):
            in_flight.append(len(chat.prompts))
            await asyncio.sleep(0.02)
            return await super().score(requests)

    chat = ScriptedChat(answer=reply)
    config = PruneConfig(protocol="select", max_tokens=4)
    await prune(triples(4 * CHUNK), config, chat=chat, scorer=Slow(lambda s: [1.0] * len(s)))
    assert in_flight[0] > 2 * CHUNK  # more than the first chunk was asked for before its scoring
