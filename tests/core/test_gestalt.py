from __future__ import annotations

import difflib
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asap.gestalt import StepMatcher, match_in_order
from asap.steps import split_steps
from strategies import steps as step_lists

TAU = 0.6


def ratio(a, b, *, autojunk=False):
    """difflib's ratio, read off the matcher: the verdict at every threshold."""
    matched = StepMatcher(b, autojunk=autojunk).matched(a, 0.0)
    return 2 * matched / (len(a) + len(b)) if a or b else 1.0


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("tide", "diet", 0.25),
        ("diet", "tide", 0.5),
        ("abcdefg", "abc", 0.6),
        ("abc", "abcwxyz", 0.6),
        ("abcdefg", "ab", 4 / 9),
        ("", "x", 0.0),
        ("", "", 1.0),
    ],
)
def test_ratio_of_source_and_reply_is_not_symmetric(a, b, expected):
    assert ratio(a, b) == pytest.approx(expected)
    assert (StepMatcher(b).matched(a, TAU) is not None) == (expected >= TAU)


def test_autojunk_ignores_frequent_characters_of_long_steps():
    a, b = "X" + "ab" * 150, "ab" * 150
    assert ratio(a, b, autojunk=True) == 0.0
    assert ratio(a, b) == pytest.approx(600 / 601)


def test_worked_example_is_valid_with_its_mapping():
    report = match_in_order(["abcd", "wxyz", "efgh"], ["abc", "efg!"], tau=TAU)
    assert (report.valid, report.kept) == (True, (0, 2))
    assert report.similarity == pytest.approx(0.75)


def test_worked_example_in_the_wrong_order_is_invalid():
    report = match_in_order(["abcd", "wxyz", "efgh"], ["efgh", "abcd"], tau=TAU)
    assert not report.valid
    assert report.reason == "step 2 of 2 matches no later step of the source"


def test_containment_bounds_invented_text():
    source, reply = ["abc"], ["abcwxyz"]
    assert match_in_order(source, reply, tau=TAU).valid
    assert not match_in_order(source, reply, tau=TAU, containment=0.9).valid


def test_an_empty_reply_is_invalid():
    assert not match_in_order(["a"], [], tau=TAU).valid


texts = st.text("ab cX\n", max_size=30)


@given(a=texts, b=texts, tau=st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]), autojunk=st.booleans())
def test_verdict_is_that_of_difflib(a, b, tau, autojunk):
    expected = difflib.SequenceMatcher(None, a, b, autojunk).ratio() >= tau
    assert (StepMatcher(b, autojunk=autojunk).matched(a, tau) is not None) == expected


@pytest.mark.parametrize("autojunk", [False, True])
def test_verdicts_on_real_pairs_are_those_of_difflib(real_traces, autojunk):
    rng = random.Random(7)
    compared = 0
    for trace in rng.sample(real_traces, 60):
        steps = split_steps(trace["cot"])
        for reply in rng.sample(steps, min(6, len(steps))):
            words = reply.split(" ")
            reply = " ".join(word for word in words if rng.random() < 0.7) or reply
            matcher = StepMatcher(reply, autojunk=autojunk)
            reference = difflib.SequenceMatcher(None, "", reply, autojunk)
            for source in [*rng.sample(steps, min(8, len(steps))), " ".join(words)]:
                reference.set_seq1(source)
                assert (matcher.matched(source, TAU) is not None) == (reference.ratio() >= TAU)
                compared += 1
    assert compared > 2000


def test_a_very_long_pair_takes_the_counting_bound_too():
    a, b = "a" * 3000, "b" * 3000
    assert StepMatcher(b).matched(a, TAU) is None
    assert StepMatcher(b).matched(b[:-1] + "c", TAU) == 2999


@given(steps=step_lists, data=st.data())
def test_any_ordered_subset_validates_at_tau_one(steps, data):
    kept = sorted(data.draw(st.sets(st.integers(0, len(steps) - 1), min_size=1)))
    report = match_in_order(steps, [steps[i] for i in kept], tau=1.0)
    assert report.valid
    assert [steps[i] for i in report.kept] == [steps[i] for i in kept]
    assert report.containment == 1.0


def exhaustive(source, reply, tau):
    """Whether any order-preserving assignment exists."""
    good = [
        [difflib.SequenceMatcher(None, s, r, False).ratio() >= tau for s in source] for r in reply
    ]
    return any(
        all(good[r][s] for r, s in enumerate(chosen))
        for chosen in itertools.combinations(range(len(source)), len(reply))
    )


short = st.text("abc", min_size=1, max_size=4)


@given(
    source=st.lists(short, min_size=1, max_size=6),
    reply=st.lists(short, min_size=1, max_size=4),
    tau=st.sampled_from([0.5, 0.6, 0.8]),
)
def test_greedy_matching_is_complete_and_monotone_in_tau(source, reply, tau):
    valid = match_in_order(source, reply, tau=tau).valid
    assert valid == exhaustive(source, reply, tau)
    if valid:
        assert match_in_order(source, reply, tau=tau / 2).valid


def test_inverting_two_dissimilar_steps_is_invalid():
    assert not match_in_order(
        ["first thing", "quite unlike"], ["quite unlike", "first thing"], tau=TAU
    ).valid
