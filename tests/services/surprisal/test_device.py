from __future__ import annotations

import asyncio

import pytest

from asap.errors import CapacityError
from asap.ports import ScoreRequest
from asap_surprisal import device
from asap_surprisal.device import PROBE, WatchedScorer
from fakes import TableScorer

REQUEST = ScoreRequest("q", ("one", "two"), ("first_token_surprisal",))
COUNTS_ONLY = ScoreRequest("q", ("one",), ())


async def work(scorer, request):
    return await scorer.score_prepared([scorer.prepare(request)])


class Device(TableScorer):
    """A device that may be lost, hang, or compute nonsense."""

    def __init__(self):
        super().__init__(lambda steps: [self.value] * len(steps))
        self.value = 1.0
        self.trouble = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def score(self, requests):
        await self.gate.wait()
        if self.trouble is not None:
            raise self.trouble
        return await super().score(requests)

    @property
    def probes(self):
        return self.requests.count(PROBE)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(device, "monotonic", lambda: Clock.now)
    return Clock


async def test_real_work_of_the_last_minute_needs_no_probe(clock):
    behind = Device()
    scorer = WatchedScorer(behind)
    await work(scorer, REQUEST)
    clock.now += 59
    await scorer.check()
    assert behind.probes == 0
    clock.now += 2
    await scorer.check()
    assert behind.probes == 1
    clock.now += 59
    await scorer.check()
    assert behind.probes == 1


async def test_counts_alone_prove_nothing(clock):
    behind = Device()
    scorer = WatchedScorer(behind)
    await work(scorer, COUNTS_ONLY)
    await scorer.check()
    assert behind.probes == 1


async def test_after_an_error_the_device_is_asked_however_fresh_it_is(clock):
    behind = Device()
    scorer = WatchedScorer(behind)
    await work(scorer, REQUEST)
    behind.trouble = RuntimeError("planted: CUDA error")
    with pytest.raises(RuntimeError):
        await work(scorer, REQUEST)
    with pytest.raises(CapacityError) as caught:
        await scorer.check()
    assert (caught.value.problem_code, caught.value.detail) == ("not-ready", "the device fails")
    behind.trouble = None
    await scorer.check()
    await scorer.check()
    assert behind.probes == 1


async def test_a_batch_that_runs_is_work_until_it_is_stuck(clock, monkeypatch):
    monkeypatch.setattr(device, "PROBE_S", 0.01)
    behind = Device()
    scorer = WatchedScorer(behind)
    behind.gate.clear()
    batch = asyncio.create_task(work(scorer, REQUEST))
    await asyncio.sleep(0)
    clock.now += 599
    await scorer.check()
    clock.now += 2
    with pytest.raises(CapacityError, match="no answer"):
        await scorer.check()
    with pytest.raises(CapacityError, match="no answer"):
        await scorer.check()
    behind.gate.set()
    await batch
    await asyncio.sleep(0)
    await scorer.check()
    assert behind.probes == 1, "one probe waits, not one for each question"


async def test_a_device_that_computes_nonsense_is_not_ready(clock):
    behind = Device()
    behind.value = None
    with pytest.raises(CapacityError, match="no finite number"):
        await WatchedScorer(behind).check()


async def test_what_a_device_without_numbers_was_to_score_is_given_back(clock):
    behind = Device()
    scorer = WatchedScorer(behind)
    behind.value = None
    await refused(scorer, REQUEST, REQUEST)
    with pytest.raises(CapacityError, match="no finite number"):
        await scorer.check()
    behind.value = 1.0
    assert (await work(scorer, REQUEST))[0].scores["first_token_surprisal"] == (1.0, 1.0)
    await scorer.check()


async def test_a_text_that_has_no_numbers_by_itself_stays_without(clock):
    """The model is at a loss for it, wherever it is scored: methods keep such steps."""

    class AtALoss(Device):
        async def score(self, requests):
            self.value = 1.0 if PROBE in requests else None
            return await super().score(requests)

    behind = AtALoss()
    scorer = WatchedScorer(behind)
    assert (await work(scorer, REQUEST))[0].scores["first_token_surprisal"] == (None, None)
    assert behind.probes == 1
    await scorer.check()
    assert behind.probes == 1


async def test_it_is_the_scorer_behind_it_to_everybody():
    behind = Device()
    behind.offers = frozenset({"mean_surprisal"})
    scorer = WatchedScorer(behind)
    assert (scorer.name, scorer.tokenizer_name) == ("table", "words")
    assert scorer.offers == {"mean_surprisal"}
    assert scorer.count("two words") == 2
    assert await work(scorer, REQUEST) == await work(behind, REQUEST)


async def test_closing_ends_a_probe_that_hangs(clock, monkeypatch):
    monkeypatch.setattr(device, "PROBE_S", 0.01)
    behind = Device()
    behind.gate.clear()
    scorer = WatchedScorer(behind)
    with pytest.raises(CapacityError):
        await scorer.check()
    await scorer.close()
    behind.gate.set()
    await asyncio.sleep(0)
    assert behind.probes == 0


LONG = ScoreRequest("q", ("one " * 50,), ("first_token_surprisal",))
FULL = CapacityError("planted: no memory")


async def refused(scorer, *requests):
    with pytest.raises(CapacityError):
        await scorer.score_prepared([scorer.prepare(request) for request in requests])


async def test_two_texts_in_a_row_without_memory_break_it_and_a_third_says_so_no_more(clock):
    behind, told = Device(), []
    scorer = WatchedScorer(behind, on_broken=lambda: told.append(behind.trouble))
    behind.trouble = FULL
    await refused(scorer, REQUEST)
    assert told == []
    for _ in range(2):
        await refused(scorer, REQUEST)
        assert told == [FULL]


async def test_a_device_without_numbers_is_broken_as_well(clock):
    behind, told = Device(), []
    scorer = WatchedScorer(behind, on_broken=lambda: told.append(1))
    behind.value = None
    for times in ([], [1], [1]):
        with pytest.raises(CapacityError, match=r"fails|no finite number"):
            await scorer.check()
        assert told == times


async def test_work_in_between_starts_the_count_anew(clock):
    behind, told = Device(), []
    scorer = WatchedScorer(behind, on_broken=lambda: told.append(1))
    for _ in range(3):
        behind.trouble = FULL
        await refused(scorer, REQUEST)
        behind.trouble = None
        await work(scorer, REQUEST)
    assert told == []


@pytest.mark.parametrize(
    ("trouble", "requests"),
    [(FULL, [REQUEST, REQUEST]), (FULL, [LONG]), (RuntimeError("planted"), [REQUEST])],
    ids=["a batch gets smaller", "longer than was sure to fit", "no lack of memory"],
)
async def test_what_does_not_break_the_device(clock, trouble, requests):
    behind, told = Device(), []
    scorer = WatchedScorer(behind, sure_tokens=40, on_broken=lambda: told.append(1))
    behind.trouble = trouble
    for _ in range(3):
        with pytest.raises(type(trouble)):
            await scorer.score_prepared([scorer.prepare(request) for request in requests])
    assert told == []


async def test_a_broken_device_is_not_ready_for_a_minute_whatever_small_things_it_can_do(clock):
    behind = Device()
    scorer = WatchedScorer(behind)
    behind.trouble = FULL
    await refused(scorer, REQUEST)
    await refused(scorer, REQUEST)
    behind.trouble = None
    clock.now += 59
    with pytest.raises(CapacityError, match="too little memory, for any text") as caught:
        await scorer.check()
    assert (caught.value.problem_code, behind.probes) == ("not-ready", 0)
    clock.now += 2
    await scorer.check()
    assert behind.probes == 1
