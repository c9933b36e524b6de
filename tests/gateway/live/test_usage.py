from __future__ import annotations

from asap_gateway.live.usage import Tally, tokens_saved


def test_the_thinking_is_estimated_from_its_share():
    tally = Tally()
    tally.read({"prompt_tokens": 3, "completion_tokens": 10})
    tally.share(3, 4)
    told = tally.told({"prompt_tokens_details": {"cached_tokens": 2}}, baseline=25.0)
    assert told == {
        "prompt_tokens_details": {"cached_tokens": 2},
        "prompt_tokens": 3,
        "completion_tokens": 10,
        "total_tokens": 13,
        "completion_tokens_details": {"reasoning_tokens": 8},
        "asap_tokens_saved": 15,
    }


def test_the_servers_own_count_goes_first():
    tally = Tally()
    tally.read({"completion_tokens": 10, "completion_tokens_details": {"reasoning_tokens": 4}})
    tally.share(9, 10)
    assert tally.reasoning == 4


def test_a_usage_that_is_nonsense_counts_nothing():
    tally = Tally()
    for usage in (None, [], {"prompt_tokens": "x", "completion_tokens": -1}, {"x": None}):
        tally.read(usage)
    tally.share(0, 0)
    assert (tally.total, tally.reasoning) == (0, None)
    assert "completion_tokens_details" not in tally.told({}, None)


def test_a_longer_completion_saves_less_than_nothing():
    assert tokens_saved(100.4, 130) == -30
