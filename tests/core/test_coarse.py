from __future__ import annotations

import random
import re

import pytest

from asap.coarse import coarse_prune, prove_reply
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


def test_one_matching_step_does_not_pass_for_a_long_trace():
    trace = Triple(
        question="q", cot=join_steps([f"step {i} of many words" for i in range(200)]), answer=""
    )
    report = prove_reply("step 3 of many words", Record(triple=trace, config=PruneConfig()))
    assert not report.valid
    assert "keeps" in report.reason


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


PARAPHRASES = {
    "need": "want",
    "the": "that",
    "is": "was",
    "so": "hence",
    "list": "array",
    "number": "value",
}


def cut_short(steps):
    text = join_steps(steps)
    return [text[: len(text) * 2 // 3].rstrip(" .\n)`:") + " th"]


def paraphrase(steps):
    return [
        re.sub(r"\w+", lambda m: PARAPHRASES.get(m[0].lower(), m[0] + "s"), step) for step in steps
    ]


INVENTED = (
    "In addition we should mention that Dijkstra's algorithm relaxes every edge of the graph in "
    "order of tentative distance, using a Fibonacci heap throughout."
)


@pytest.mark.parametrize(
    ("edit", "accepted"),
    [
        (lambda steps: steps, True),
        (lambda steps: ["Here is the compressed thinking:", *steps], True),
        (lambda steps: ["```\n" + join_steps(steps) + "\n```"], True),
        (lambda steps: steps[::-1], False),
        (cut_short, False),
        (paraphrase, False),
        (lambda steps: [*steps, INVENTED], False),
    ],
    ids=["faithful", "preamble", "fence", "reordered", "truncated", "paraphrased", "invented"],
)
def test_edited_replies_of_real_traces(real_traces, edit, accepted):
    rng = random.Random(3)
    tried = verdicts = 0
    for trace in real_traces:
        whole = Record(
            triple=Triple(question="q", cot=trace["cot"], answer="a"), config=PruneConfig()
        )
        kept = [step for step in whole.source_steps if rng.random() < 0.5]
        if sum(len(step.split()) for step in kept) < 150:
            continue
        tried += 1
        verdicts += prove_reply(join_steps(edit(kept)), whole).valid == accepted
    assert tried > 300
    assert verdicts >= 0.98 * tried
