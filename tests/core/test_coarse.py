from __future__ import annotations

import itertools
import json
import re

import pytest

from asap.coarse import coarse_prune
from asap.config import PruneConfig
from asap.errors import InvalidInput, UpstreamUnavailable
from asap.prompts import KEEP_SCHEMA
from asap.steps import join_steps
from asap.types import Record, Triple
from fakes import ScriptedChat, said

COT = join_steps(
    [
        "Okay, I need to sort the list of numbers without the built-in function.",
        "Maybe a heap would do it, but that is too much for this small task here.",
        "So selection sort finds the smallest number and swaps it with the first.",
        "Then it goes on with the rest of the list until nothing is left to sort.",
    ]
)
TRIPLE = Triple(question="Sort!", cot=COT, answer="Done.\n```python\ndef sort(xs): ...\n```")
DIRECT = "Step-by-Step Solution: pick the smallest, again and again."


def record(**config):
    return Record(triple=TRIPLE, config=PruneConfig(**config))


def faithful(*kept):
    return join_steps([COT.split("\n\n")[i] for i in kept])


async def test_rewrite_emits_the_matched_source_steps_word_for_word():
    chat = ScriptedChat(
        DIRECT, faithful(0, 2).replace("Okay", "okay").replace("the smallest", "smallest")
    )
    pruned = await coarse_prune(record(), chat)
    assert pruned.coarse.kept == (0, 2)
    assert pruned.pruned_cot == faithful(0, 2)
    assert pruned.coarse.direct_cot == DIRECT
    assert pruned.status == "compressed"


async def test_the_direct_cot_is_the_anchor_and_decoding_follows_the_paper():
    chat = ScriptedChat(DIRECT, faithful(0))
    await coarse_prune(record(), chat)
    direct, coarse = chat.prompts
    assert "Sort!" in direct
    assert "def sort(xs): ..." in direct
    assert DIRECT in coarse
    assert COT in coarse
    assert [s.temperature for s in chat.samplings] == [0.0, 2.0]
    assert all(s.top_p == 1.0 and s.max_tokens == 16384 for s in chat.samplings)


async def test_select_asks_for_numbers_with_a_schema_and_keeps_those_steps():
    chat = ScriptedChat(DIRECT, '{"keep": [1, 3]}')
    pruned = await coarse_prune(record(protocol="select"), chat)
    assert pruned.coarse.kept == (0, 2)
    assert pruned.coarse.attempts[-1].report.match == "exact"
    assert chat.samplings[-1].json_schema == KEEP_SCHEMA


async def test_failed_attempts_are_bounded_kept_and_each_a_fresh_sample():
    replies = ["", said(faithful(0), "length"), "Quite another text, about sorting in general."]
    chat = ScriptedChat(DIRECT, *replies, faithful(0, 2, 3))
    pruned = await coarse_prune(record(seed=7), chat)
    outcomes = [a.outcome for a in pruned.coarse.attempts]
    assert outcomes == ["accepted", "empty", "truncated", "invalid", "accepted"]
    assert [s.seed for s in chat.samplings[1:]] == [8, 9, 10, 11]
    assert "of the reply's words" in pruned.coarse.attempts[3].report.reason
    assert pruned.coarse.usage.calls == 5


async def test_an_exhausted_record_falls_back_to_the_original_or_is_rejected():
    for on_fail, status in (("original", "fallback_original"), ("drop", "rejected")):
        chat = ScriptedChat(DIRECT, *["nonsense"] * 2)
        pruned = await coarse_prune(record(on_fail=on_fail, max_attempts=2), chat)
        assert pruned.status == status
        assert pruned.pruned_cot == COT
        assert pruned.flags == ("coarse_exhausted",)
        assert len(chat.prompts) == 3


async def test_an_empty_direct_cot_is_retried_then_fails_the_sample():
    chat = ScriptedChat("", said("cut", "length"))
    pruned = await coarse_prune(record(max_attempts=2), chat)
    assert pruned.status == "fallback_original"
    assert pruned.coarse.direct_cot is None


@pytest.mark.parametrize(
    "reason", ["length", "content_filter", "insufficient_system_resource", "error", "abort"]
)
async def test_a_reply_that_was_broken_off_is_no_anchor_and_no_coarse_cot(reason):
    chat = ScriptedChat(said("Step-by", reason), DIRECT, said(faithful(0), reason), faithful(0, 2))
    pruned = await coarse_prune(record(), chat)
    outcomes = [a.outcome for a in pruned.coarse.attempts]
    assert outcomes == ["truncated", "accepted", "truncated", "accepted"]
    assert pruned.coarse.direct_cot == DIRECT


async def test_a_refusal_without_text_is_empty():
    chat = ScriptedChat(said("", "content_filter"), DIRECT, faithful(0))
    pruned = await coarse_prune(record(), chat)
    assert pruned.coarse.attempts[0].outcome == "empty"


async def test_a_prompt_that_leaves_no_room_for_a_reply_is_never_sent():
    triple = Triple(question="q", cot=COT * 100, answer="a")
    chat = ScriptedChat(DIRECT)
    with pytest.raises(InvalidInput, match="'select' shows a long CoT in windows"):
        await coarse_prune(Record(triple=triple, config=PruneConfig(context_tokens=4096)), chat)
    assert len(chat.prompts) == 1


async def test_transport_errors_pass_through_and_are_no_attempts():
    with pytest.raises(UpstreamUnavailable):
        await coarse_prune(record(), ScriptedChat(UpstreamUnavailable("gone")))


async def test_unreadable_selection_is_an_attempt():
    chat = ScriptedChat(DIRECT, "all of them", '{"keep": [9]}', '{"keep": [2]}')
    pruned = await coarse_prune(record(protocol="select"), chat)
    outcomes = [a.outcome for a in pruned.coarse.attempts[1:]]
    assert outcomes == ["unparsable", "unparsable", "accepted"]


async def test_paper_preset_keeps_the_text_of_the_llm():
    reply = faithful(0, 2).replace("smallest", "least")
    pruned = await coarse_prune(record(preset="paper"), ScriptedChat(DIRECT, reply))
    assert pruned.pruned_cot == reply
    assert pruned.kept_steps is None
    assert pruned.coarse.attempts[-1].report.kept == (0, 2)


async def test_extra_blank_lines_in_a_reply_do_no_harm():
    reply = faithful(0, 2).replace("\n\n", "\n\n\n\n")
    pruned = await coarse_prune(record(preset="paper"), ScriptedChat(DIRECT, reply))
    assert pruned.coarse.status == "accepted"


async def test_keeping_everything_is_flagged():
    pruned = await coarse_prune(record(), ScriptedChat(DIRECT, COT))
    assert (pruned.status, pruned.flags) == ("unchanged", ("no_coarse_gain",))


async def test_method_direct_is_the_direct_cot():
    pruned = await coarse_prune(record(method="direct"), ScriptedChat(f"\n{DIRECT}\n"))
    assert pruned.pruned_cot == DIRECT


async def test_answers_without_code_are_refused_only_when_asked():
    plain = Triple(question="2+2?", cot=COT, answer="4")
    chat = ScriptedChat(DIRECT, faithful(0))
    pruned = await coarse_prune(Record(triple=plain, config=PruneConfig()), chat)
    assert "4" in chat.prompts[0]
    assert pruned.coarse.kept == (0,)
    with pytest.raises(InvalidInput, match="no fenced Python block"):
        await coarse_prune(Record(triple=plain, config=PruneConfig(require_code=True)), chat)


async def test_extractive_anchor_needs_no_llm_and_says_so():
    pruned = await coarse_prune(record(anchor="extractive"), None)
    assert pruned.coarse.model == "extractive"
    assert pruned.coarse.protocol == "extractive"
    with pytest.raises(InvalidInput, match="needs an LLM"):
        await coarse_prune(record(anchor="extractive", method="direct"), None)
    with pytest.raises(InvalidInput, match="needs an LLM"):
        await coarse_prune(record(), None)


async def test_an_empty_cot_calls_nobody():
    empty = Record(triple=Triple(question="q", cot=" \n", answer="a"), config=PruneConfig())
    pruned = await coarse_prune(empty, ScriptedChat())
    assert (pruned.status, pruned.flags, pruned.pruned_cot) == ("unchanged", ("empty_cot",), " \n")


async def test_recorded_replies_through_the_whole_stage(real_traces, llm_replies):
    traces = {trace["id"]: trace for trace in real_traces}
    characters = {"rewrite": 0, "select": 0}
    for recorded in llm_replies:
        trace = traces[recorded["id"]]
        triple = Triple(**{name: trace[name] for name in ("id", "question", "cot", "answer")})
        for protocol in ("rewrite", "select"):
            config = PruneConfig(protocol=protocol, max_attempts=1)
            chat = ScriptedChat(recorded["direct"], recorded[protocol])
            pruned = await coarse_prune(Record(triple=triple, config=config), chat)
            assert pruned.coarse.status == "accepted", (recorded["id"], protocol)
            assert 0 < len(pruned.kept_steps) < len(pruned.source_steps)
            characters[protocol] += len(recorded[protocol])
    assert characters["rewrite"] > 30 * characters["select"]


def answer_of(*kept_or_texts):
    """Replies of `select` as the LLM gives them."""
    return [json.dumps({"keep": list(kept)}) for kept in kept_or_texts]


async def test_the_ladder_gives_later_attempts_their_temperature():
    chat = ScriptedChat(DIRECT, *["nonsense"] * 4)
    await coarse_prune(record(rewrite_ladder=(1.0, 0.5), max_attempts=4), chat)
    assert [s.temperature for s in chat.samplings] == [0.0, 2.0, 1.0, 0.5, 0.5]


LONG = [f"Step number {i} says something of its own about item {i}. " * 6 for i in range(60)]


def long_record(**config):
    triple = Triple(question="Sort!", cot=join_steps(LONG), answer="Done.")
    return Record(triple=triple, config=PruneConfig(protocol="select", **config))


def numbers_shown(prompt):
    return [int(n) for n in re.findall(r"^\[(\d+)\] ", prompt, re.MULTILINE)]


async def test_a_long_trace_is_chosen_from_in_windows_that_overlap():
    """The reader keeps even numbers; a window that shows none of its own has nothing to keep."""

    def keep_even(prompt):
        if "Thinking:" not in prompt:
            return DIRECT
        return json.dumps({"keep": [n for n in numbers_shown(prompt) if n % 2 == 0]})

    chat = ScriptedChat(answer=keep_even)
    pruned = await coarse_prune(long_record(context_tokens=4096, max_reply_tokens=1024), chat)
    assert pruned.coarse.status == "accepted"
    assert pruned.coarse.kept == tuple(range(1, 60, 2))
    shown = [numbers_shown(prompt) for prompt in chat.prompts[1:]]
    assert len(shown) > 2
    assert {n for window in shown for n in window} == set(range(1, 61))
    assert all(set(a) & set(b) for a, b in itertools.pairwise(shown))
    for prompt, sampling in zip(chat.prompts, chat.samplings, strict=True):
        assert len(prompt.encode()) / 3 + sampling.max_tokens <= 4096
        assert sampling.max_tokens == 1024
    assert "steps 1 to" in chat.prompts[1]
    assert "of 60" in chat.prompts[1]


async def test_the_same_trace_fits_one_window_of_a_large_context():
    chat = ScriptedChat(DIRECT, *answer_of([1, 60]))
    pruned = await coarse_prune(long_record(context_tokens=100_000), chat)
    assert pruned.coarse.kept == (0, 59)
    assert "are chosen apart" not in chat.prompts[1]


async def test_a_window_may_keep_nothing_but_the_trace_may_not():
    chat = ScriptedChat(answer=lambda p: '{"keep": []}' if "Thinking:" in p else DIRECT)
    config = {"context_tokens": 4096, "max_reply_tokens": 1024, "max_attempts": 1}
    pruned = await coarse_prune(long_record(**config), chat)
    assert pruned.coarse.status == "fallback_original"
    assert len(chat.prompts) > 3


async def test_a_window_whose_attempts_all_fail_ends_the_record():
    chat = ScriptedChat(answer=lambda p: '{"keep": [999]}' if "Thinking:" in p else DIRECT)
    config = {"context_tokens": 4096, "max_reply_tokens": 1024, "max_attempts": 2}
    pruned = await coarse_prune(long_record(**config), chat)
    assert pruned.coarse.status == "fallback_original"
    assert len(chat.prompts) == 3


async def test_a_direct_cot_that_fills_the_context_is_refused():
    chat = ScriptedChat("word " * 3000)
    with pytest.raises(InvalidInput, match="too small"):
        await coarse_prune(long_record(context_tokens=4096), chat)


CODED = [
    "First we think about the problem for a while, as everybody would do here.",
    "```python\nx = [3, 1, 2]\nx.sort()\n```",
    "Perhaps there is another way, but we do not look for it any longer now.",
    "    total = 0\n    for item in x:\n        total += item",
    "So the list is sorted and the sum is six, which is what was asked for.",
]


@pytest.mark.parametrize("protocol", ["select", "rewrite"])
async def test_protected_code_stays(protocol):
    triple = Triple(question="q", cot=join_steps(CODED), answer="a")
    reply = '{"keep": [5]}' if protocol == "select" else CODED[4]
    kept = {}
    for protect in (False, True):
        config = PruneConfig(protocol=protocol, protect_code=protect)
        pruned = await coarse_prune(Record(triple=triple, config=config), ScriptedChat("d", reply))
        kept[protect] = pruned.coarse.kept
        assert pruned.coarse.attempts[-1].report.kept == (4,)
    assert kept == {False: (4,), True: (1, 3, 4)}


async def test_the_extractive_anchor_protects_code_too():
    triple = Triple(question="q", cot=join_steps(CODED), answer="nothing of it")
    config = PruneConfig(anchor="extractive", extractive_keep=0.1, protect_code=True)
    pruned = await coarse_prune(Record(triple=triple, config=config), None)
    assert {1, 3} <= set(pruned.coarse.kept) < set(range(5))
