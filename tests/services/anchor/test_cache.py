"""The reply cache: what makes a key, what survives a crash, what counts as a miss."""

from __future__ import annotations

import dataclasses
import json
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asap.errors import Misconfigured
from asap.ports import ChatResult, Sampling
from asap.types import Usage
from asap_anchor.cache import ReplyCache, reply_key

SAMPLING = Sampling(temperature=2.0, max_tokens=100, seed=1, top_p=1.0, json_schema=None)
RESULT = ChatResult(
    "a\n\nstep with ünïcode \u2028 and \x00",
    "stop",
    Usage(calls=1, prompt_tokens=10, completion_tokens=3, cost_usd=0.1 + 0.2),
)
OTHER_VALUES = {
    "temperature": 1.9,
    "max_tokens": 101,
    "seed": 2,
    "top_p": 0.9,
    "json_schema": {"type": "object"},
}


@pytest.fixture
def cache(tmp_path):
    return ReplyCache(tmp_path / "replies")


@pytest.fixture
def key():
    return reply_key("model", "prompt", SAMPLING)


def kept_file(cache, tmp_path, key):
    cache.put(key, RESULT)
    return tmp_path / "replies" / key[:2] / f"{key}.json"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Sampling)])
def test_every_decoding_parameter_changes_the_key(key, name):
    changed = dataclasses.replace(SAMPLING, **{name: OTHER_VALUES[name]})

    assert reply_key("model", "prompt", changed) != key


questions = st.tuples(
    st.text(max_size=8),
    st.text(max_size=8),
    st.builds(
        Sampling,
        temperature=st.floats(0, 2),
        max_tokens=st.integers(1, 9),
        seed=st.integers(0, 9),
        top_p=st.floats(0, 1),
        json_schema=st.none() | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    ),
)


@given(questions, questions)
def test_keys_are_equal_exactly_when_the_questions_are(one, other):
    same = json.dumps([*one[:2], dataclasses.asdict(one[2])], sort_keys=True) == json.dumps(
        [*other[:2], dataclasses.asdict(other[2])], sort_keys=True
    )

    assert (reply_key(*one) == reply_key(*other)) == same


def test_key_does_not_depend_on_the_order_of_schema_keys():
    one = dataclasses.replace(SAMPLING, json_schema={"a": 1, "b": 2})
    other = dataclasses.replace(SAMPLING, json_schema={"b": 2, "a": 1})

    assert reply_key("m", "p", one) == reply_key("m", "p", other)


def test_key_stays_the_same_between_releases():
    assert reply_key("model", "prompt", SAMPLING) == (
        "8d51d156fe1ba95e0e9fcdb8bade11802a0a6638c85db1cb82376f85e5bfb339"
    )


def test_reads_back_the_identical_result(cache, key):
    cache.put(key, RESULT)

    assert cache.get(key) == RESULT


results = st.builds(
    ChatResult,
    text=st.text(),
    finish_reason=st.text(max_size=8),
    usage=st.builds(
        Usage,
        calls=st.just(1),
        prompt_tokens=st.integers(0, 2**40),
        completion_tokens=st.integers(0, 2**40),
        cost_usd=st.none() | st.floats(0, 1e9),
    ),
)


@given(results)
def test_any_result_reads_back_identical(tmp_path_factory, result):
    cache = ReplyCache(tmp_path_factory.mktemp("replies"))

    cache.put("00ff", result)

    assert cache.get("00ff") == result


def test_knows_nothing_before_the_first_write_and_makes_no_directory(cache, tmp_path, key):
    assert cache.get(key) is None
    assert list(tmp_path.iterdir()) == []


def test_files_are_sharded_and_for_the_owner_only(cache, tmp_path, key):
    path = kept_file(cache, tmp_path, key)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o077 == 0


def test_a_later_reply_replaces_the_kept_one(cache, key):
    cache.put(key, RESULT)
    cache.put(key, dataclasses.replace(RESULT, text="new"))

    assert cache.get(key).text == "new"


def test_every_truncation_is_a_miss(cache, tmp_path, key):
    path = kept_file(cache, tmp_path, key)
    whole = path.read_bytes()

    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert cache.get(key) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"\xff\xfe",
        b"{}",
        b'{"format": 2, "text": "", "finish_reason": "stop", "usage": {}}',
        b'{"format": 1, "text": null, "finish_reason": "stop", "usage": {}}',
        b'{"format": 1, "text": "", "finish_reason": "stop", "usage": {}, "more": 1}',
    ],
)
def test_a_damaged_or_foreign_file_is_a_miss_and_is_replaced(cache, tmp_path, key, content):
    path = kept_file(cache, tmp_path, key)
    path.write_bytes(content)

    assert cache.get(key) is None

    cache.put(key, RESULT)
    assert cache.get(key) == RESULT


def test_a_writer_that_was_killed_leaves_no_partial_record(cache, tmp_path, key):
    shard = tmp_path / "replies" / key[:2]
    shard.mkdir(parents=True)
    (shard / ".killed.tmp").write_bytes(b'{"format": 1, "text": "half')

    assert cache.get(key) is None

    cache.put(key, RESULT)
    assert cache.get(key) == RESULT


def test_an_interrupted_write_removes_its_temporary_file(cache, tmp_path, key):
    path = tmp_path / "replies" / key[:2] / f"{key}.json"
    path.mkdir(parents=True)  # the rename fails

    with pytest.raises(Misconfigured):
        cache.put(key, RESULT)

    assert list(path.parent.iterdir()) == [path]


def test_a_directory_that_cannot_be_written_is_named(tmp_path, key):
    (tmp_path / "file").write_text("")
    cache = ReplyCache(tmp_path / "file")

    with pytest.raises(Misconfigured, match="file") as caught:
        cache.put(key, RESULT)

    assert "step" not in str(caught.value)
