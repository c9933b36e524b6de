from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asap.errors import UpstreamError, UpstreamTimeout
from asap_gateway.live.streams import (
    DONE,
    MAX_EVENT_BYTES,
    EventReader,
    PlainStream,
    error_event,
    event,
)


def chunk(text, **more):
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], **more}


USAGE = {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 5}}
STREAM = b"".join(
    [b": a comment\n\n", *(event(chunk(t)) for t in ("a", "é\n\n", "</th", "ink>", "b")),
     event(USAGE), DONE]
)  # fmt: skip
WITHOUT_USAGE = STREAM.replace(event(USAGE), b"")


@st.composite
def pieces(draw, stream=STREAM):
    ends = [0, *sorted(draw(st.lists(st.integers(0, len(stream)), max_size=12))), len(stream)]
    return [stream[a:b] for a, b in pairwise(ends)]


def plain(**options):
    return PlainStream(**{"wants_usage": False, "opened": True, "baseline": None} | options)


@given(cut=pieces())
def test_any_cut_passes_the_same_bytes(cut):
    stream = plain()
    assert b"".join(map(stream.feed, cut)) == WITHOUT_USAGE
    assert stream.done
    tally = stream.settle()
    assert (tally.prompt, tally.completion) == (4, 5)
    assert tally.reasoning == 3  # of five pieces of text: a, é, and half a tag


@given(cut=pieces())
def test_usage_that_was_asked_for_is_completed(cut):
    stream = plain(wants_usage=True, baseline=20.0)
    sent = b"".join(map(stream.feed, cut))
    told = json.loads(sent.split(b"\n\n")[-3].removeprefix(b"data: "))["usage"]
    assert told["completion_tokens_details"] == {"reasoning_tokens": 3}
    assert told["asap_tokens_saved"] == 15
    assert sent.replace(event({"choices": [], "usage": told}), b"") == WITHOUT_USAGE


def test_usage_beside_text_is_the_callers(monkeypatch):
    stream = plain(wants_usage=True)
    running = event(chunk("a", usage={"prompt_tokens": 4, "completion_tokens": 1}))
    assert stream.feed(running) == running
    assert stream.tally.completion == 1


def test_thinking_that_the_server_set_apart_is_counted():
    stream = plain(opened=False)
    for delta in ({"reasoning": "x"}, {"reasoning_content": "y"}, {"content": "z"}):
        stream.feed(event({"choices": [{"index": 0, "delta": delta}]}))
    stream.feed(event({"choices": [], "usage": {"completion_tokens": 30}}))
    assert stream.settle().reasoning == 20


@pytest.mark.parametrize("bad", [b"data: {broken\n\n", event({"error": {"message": "planted"}})])
def test_what_came_before_a_failure_is_good(bad):
    stream = plain()
    assert stream.feed(event(chunk("a")) + bad + event(chunk("b"))) == event(chunk("a"))
    assert isinstance(stream.failure, UpstreamError)
    assert "planted" not in str(stream.failure)
    assert not stream.done


def test_an_event_without_an_end_is_refused():
    reader = EventReader()
    assert reader.feed(b"x" * MAX_EVENT_BYTES) == []
    with pytest.raises(UpstreamError):
        reader.feed(b"x")


def test_an_error_is_an_event_that_clients_know():
    data = error_event(UpstreamTimeout("silent"))
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    error = json.loads(data.removeprefix(b"data: "))["error"]
    assert (error["message"], error["code"]) == ("silent", "upstream-timeout")
