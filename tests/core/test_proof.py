from __future__ import annotations

import random
import re

import pytest

from asap.config import PruneConfig
from asap.proof import prove_reply
from asap.steps import join_steps
from asap.types import Record, Triple


def test_one_matching_step_does_not_pass_for_a_long_trace():
    trace = Triple(
        question="q", cot=join_steps([f"step {i} of many words" for i in range(200)]), answer=""
    )
    report = prove_reply("step 3 of many words", Record(triple=trace, config=PruneConfig()))
    assert not report.valid
    assert "keeps" in report.reason


def test_a_refusal_by_algorithm_1_names_the_nearest_step_and_its_ratio():
    trace = Triple(question="q", cot="abcd efgh\n\nijkl mnop\n\nqrst uvwx", answer="")
    record = Record(triple=trace, config=PruneConfig(preset="paper"))
    report = prove_reply("abcd efgh\n\nijkl 0123", record)
    assert not report.valid
    assert report.kept == (0,)
    assert "step 2 of 2" in report.reason
    assert "the nearest, step 2, has a ratio of 0.56, 0.60 is needed" in report.reason
    assert report.similarity == pytest.approx(0.56, abs=0.005)


def test_a_refusal_without_anything_alike_names_no_step():
    trace = Triple(question="q", cot="abcd\n\nefgh", answer="")
    record = Record(triple=trace, config=PruneConfig(preset="paper"))
    report = prove_reply("0123", record)
    assert not report.valid
    assert "nearest" not in report.reason


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
