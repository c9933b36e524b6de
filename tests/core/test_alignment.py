from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asap.alignment import align_words, match_by_alignment
from asap.fences import unwrap
from asap.steps import join_steps, split_steps
from strategies import steps as step_lists

SOURCE = [
    "Okay, I need to sort the list of numbers without the built-in function.",
    "Maybe a heap would do it, but that is too much for this small task here.",
    "So selection sort finds the smallest number and swaps it with the first.",
    "Wait, no.",
    "def sort(xs):\n    return xs",
    "Then it goes on with the rest of the list until nothing is left to sort.",
]


def verdict(reply):
    return match_by_alignment(SOURCE, reply)


def test_a_faithful_subset_keeps_its_steps():
    report = verdict(join_steps([SOURCE[0], SOURCE[2], SOURCE[5]]))
    assert (report.valid, report.kept, report.fidelity) == (True, (0, 2, 5), 1.0)


def test_sentences_cut_inside_merged_paragraphs_changed_capitals_and_marks_are_tolerated():
    reply = "okay, i need to sort the list of numbers. SO selection sort finds the smallest number!"
    assert verdict(reply).kept == (0, 2)


def test_a_leading_line_that_announces_the_reply_is_not_counted():
    report = verdict("Here is the compressed thinking:\n\n" + SOURCE[2])
    assert (report.valid, report.kept) == (True, (2,))


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "no word"),
        (
            "This problem wants an ordering algorithm, which I shall now write down in full.",
            "stand in",
        ),
        (join_steps([SOURCE[5], SOURCE[2], SOURCE[0]]), "stand in the source in order"),
        (join_steps([SOURCE[0], SOURCE[2]])[:-14], "stops inside a sentence"),
        (join_steps([SOURCE[0], SOURCE[2]])[:-3], "stops inside a sentence"),
    ],
)
def test_paraphrase_reordering_and_stopping_are_refused(reply, reason):
    report = verdict(reply)
    assert not report.valid
    assert reason in report.reason


def test_an_invented_paragraph_is_found_in_a_reply_that_is_faithful_on_the_whole():
    rng = random.Random(0)
    source = [" ".join(f"w{rng.randrange(400)}" for _ in range(20)) + "." for _ in range(40)]
    invented = (
        "The solution therefore uses two pointers that move towards each other until they meet."
    )
    report = match_by_alignment(source, join_steps([*source[:20], invented, *source[20:]]))
    assert report.fidelity > 0.95
    assert report.reason.startswith("paragraph 21 of 41 does not stand in the source in order")
    assert report.similarity < 0.5


def test_a_paraphrase_is_named_with_the_words_that_it_keeps():
    paraphrase = "We could try many other things, but one of them, the heap, is heavy."
    report = verdict(join_steps([SOURCE[0], paraphrase, SOURCE[2]]))
    assert not report.valid
    assert "paragraph 2 of 3 has the fewest" in report.reason
    assert report.similarity == min(report.similarity, report.fidelity)


def test_a_reply_may_end_with_a_line_of_the_source_that_has_no_full_stop():
    assert verdict(join_steps([SOURCE[2], SOURCE[4]])).kept == (2, 4)


def test_a_step_without_words_stays_with_the_step_before_it():
    report = match_by_alignment(["first step here", "---", "second step"], "first step here")
    assert report.kept == (0, 1)


def test_words_slide_to_the_run_they_stand_beside():
    source = ["a", "x", "b", "c", "d"]
    # the common subsequence may take "a" from the front; "b c d" stand together behind it
    assert align_words(source, ["b", "c", "d"]) == [(2, 0, 3)]
    assert align_words(["the", "end", "so", "the", "answer"], ["so", "the", "answer"]) == [
        (2, 0, 3)
    ]


@given(steps=step_lists, data=st.data())
def test_runs_are_real_matches_in_order(steps, data):
    source = " ".join(steps).split()
    target = data.draw(st.lists(st.sampled_from([*source, "zzz"]), max_size=20))
    end_source = end_target = 0
    for at, to, size in align_words(source, target):
        assert source[at : at + size] == target[to : to + size]
        assert at >= end_source
        assert to >= end_target
        end_source, end_target = at + size, to + size


def test_recorded_replies(real_traces, llm_replies):
    """All 16 faithful replies pass; of the flawed ones those with a harmless flaw only."""
    sources = {trace["id"]: split_steps(trace["cot"]) for trace in real_traces}
    harmless = ("starts with", "wraps", "merges")
    for reply in llm_replies:
        source = sources[reply["id"]]
        assert match_by_alignment(source, unwrap(reply["rewrite"])).valid, reply["id"]
        flawed = match_by_alignment(source, unwrap(reply["flawed_rewrite"]))
        assert flawed.valid == reply["flaw"].startswith(harmless), (reply["id"], flawed.reason)


def test_random_edits_of_every_trace(real_traces):
    """Faithful cuts are accepted, unfaithful edits refused; the rates are those in the
    documentation.
    """
    rng = random.Random(11)
    vocabulary = [word for trace in real_traces[:80] for word in trace["cot"].split()]
    tried = dict.fromkeys(("faithful", "paraphrase", "reorder", "invent"), 0)
    accepted = dict(tried)
    for trace in real_traces:
        source = split_steps(trace["cot"])
        faithful = [cut(step, rng) for step in source if rng.random() < 0.45]
        long = [i for i, step in enumerate(faithful) if len(re.findall(r"\w+", step)) >= 20]
        if len(long) < 2:
            continue
        first, second = sorted(rng.sample(long, 2))
        reordered = list(faithful)
        reordered[first], reordered[second] = faithful[second], faithful[first]
        paraphrased = [
            " ".join(rng.choice(vocabulary) if rng.random() < 0.3 else w for w in step.split(" "))
            for step in faithful
        ]
        invented = list(faithful)
        invented.insert(first, " ".join(rng.choice(vocabulary) for _ in range(25)))
        for kind, reply in {
            "faithful": faithful,
            "paraphrase": paraphrased,
            "reorder": reordered,
            "invent": invented,
        }.items():
            tried[kind] += 1
            accepted[kind] += match_by_alignment(source, join_steps(reply)).valid
    assert tried["faithful"] > 300
    assert accepted["faithful"] >= 0.98 * tried["faithful"]
    assert accepted["paraphrase"] <= 0.01 * tried["paraphrase"]
    assert accepted["reorder"] <= 0.02 * tried["reorder"]
    assert accepted["invent"] <= 0.01 * tried["invent"]


def cut(step, rng):
    """What models do: drop a sentence of a paragraph, drop a word, change the first capital."""
    sentences = re.split(r"(?<=[.?!]) ", step)
    if len(sentences) > 2 and rng.random() < 0.5:
        sentences.pop(rng.randrange(len(sentences)))
    step = " ".join(sentences)
    return step[0].swapcase() + step[1:] if rng.random() < 0.1 else step
