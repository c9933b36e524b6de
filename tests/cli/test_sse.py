from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from asap_cli.sse import ServerEvent, parse_events

STREAM = (
    b": ping\r\n\r\n"
    b"id: 1\r\nevent: progress\r\ndata: {\r\ndata:  }\r\n\r\n"
    b"data:plain\n\n"
    b"event: nothing\n\n"
    b"id: a\x00b\rdata: \xe2\x80\xa8\r\r"
    b"retry: 5\nid\ndata\n\n"
    b"event: end\ndata: cut off\n"
)
EVENTS = [
    ServerEvent("progress", "{\n }", "1"),
    ServerEvent("message", "plain", "1"),
    ServerEvent("message", "\u2028", "1"),
    ServerEvent("message", "", ""),
]


def test_reads_events_as_the_standard_says():
    assert list(parse_events([STREAM])) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_where_the_network_cuts_does_not_matter(cuts):
    ends = [0, *sorted(cuts), len(STREAM)]
    chunks = [STREAM[start:end] for start, end in pairwise(ends)]
    assert list(parse_events(chunks)) == EVENTS
