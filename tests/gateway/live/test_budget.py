"""The parts that need no server; test_proxy has the whole over HTTP."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from asap.extraction import ends_in_loop
from asap_gateway.live.budget import _Watch, begins_thinking, closing
from asap_gateway.live.requests import Thinking, read_request
from asap_gateway.live.settings import ServingSettings
from asap_gateway.live.think_splitter import split_thinking
from asap_gateway.live.upstreams import Upstreams


def chunk(text, finish=None):
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


def watch(*, opened=True, **limits):
    return _Watch(Thinking(**limits), opened=opened)


def stop_of(watch, texts):
    """(number of the first chunk that must not go on, why)."""
    for number, text in enumerate(texts, 1):
        reason = watch.stops(chunk(text), number)
        if reason is not None:
            return number, reason
    return None


def test_the_budget_counts_tokens_of_the_thinking_alone():
    assert stop_of(watch(budget_tokens=3), "abcdef") == (4, "budget")
    assert stop_of(watch(budget_tokens=3), ["a", "b", "</think>", *"cdefgh"]) is None
    assert stop_of(watch(budget_tokens=3), ["a", "b", "c", "</think>", "d"]) is None
    assert stop_of(watch(budget_tokens=3, opened=False), "abcdef") is None
    assert stop_of(watch(budget_tokens=3, opened=False), ["<think>", *"abcdef"]) == (4, "budget")


def test_an_end_of_its_own_is_no_reason():
    one = watch(budget_tokens=1)
    assert one.stops(chunk("a"), 1) is None
    assert one.stops(chunk("b", "length"), 2) is None
    assert one.text == "ab"


def test_what_must_not_go_on_is_not_part_of_the_text():
    one = watch(budget_tokens=2)
    stop_of(one, "abcdef")
    assert one.text == "ab"


@given(
    head=st.text("ab \n", max_size=300),
    turn=st.text("abc. \n", min_size=1, max_size=120),
    times=st.integers(1, 120),
)
@example(head="", turn="x", times=120)
@example(head="abc", turn="y" * 119 + ".", times=100)
def test_the_short_cut_finds_the_loops_that_the_detector_finds(head, turn, times):
    text = head + turn * times
    one = watch(loop_guard=True)
    one._pieces = [text]
    assert one._turns(10_000) == ends_in_loop(text)


def test_a_loop_is_found_while_it_grows():
    number, reason = stop_of(watch(loop_guard=True), ["wait, let me check. "] * 1000)
    assert reason == "loop"
    assert number * len("wait, let me check. ") < 500


def test_the_closing_text_ends_the_thinking():
    thinking, answer = split_thinking(f"so far{closing('Enough.')}then", opened=True)
    assert (thinking, answer) == ("so far\n\nEnough.", "then")


def test_where_a_completion_begins():
    route = Upstreams(ServingSettings(endpoints={"m": ("http://a:1",)})).find("t", "m")
    chat = read_request("chat/completions", {"model": "m", "messages": [{}]})
    assert begins_thinking(chat, route)
    for prompt, wanted in (
        ("Q<think>\n", True),
        ("Q", False),
        ("<think>a</think>", False),
        (["Q<think>\n", "R<think>"], True),
        (["Q", "R"], False),
        ([1, 2], True),  # nobody here can read them
        ([[1, 2]], True),
    ):
        asked = read_request("completions", {"model": "m", "prompt": prompt})
        assert begins_thinking(asked, route) is wanted
