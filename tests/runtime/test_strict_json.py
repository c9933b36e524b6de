from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asap.errors import InvalidInput
from asap_runtime.strict_json import MAX_DEPTH, parse_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_what_json_can_say_is_read_as_it_is(value):
    try:
        raw = json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair
        raw = json.dumps(value).encode()
        with pytest.raises(InvalidInput, match="surrogate"):
            parse_json(raw)
    else:
        assert parse_json(raw) == parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "malformed-json"),
        (b"{", "malformed-json"),
        (b"{} {}", "malformed-json"),
        (b"{'a': 1}", "malformed-json"),
        (b"[NaN]", "malformed-json"),
        (b"[-Infinity]", "malformed-json"),
        (b"1" * 5000, "malformed-json"),
        (b"\xef\xbb\xbf{}", "malformed-json"),
        (b"\xff{}", "invalid-utf8"),
        (b'{"a": "\xc3"}', "invalid-utf8"),
        (b'{"a": "\xed\xa0\x80"}', "invalid-utf8"),
        (b'{"a": "\\ud800"}', "invalid-utf8"),
        (b'{"\\uDFFF": 1}', "invalid-utf8"),
        (b'{"a": 1, "a": 2}', "invalid-input"),
        (b'[{"b": {"a": 1, "\\u0061": 1}}]', "invalid-input"),
        (b"[" * 1_000_000, "malformed-json"),
        (b'{"a":' * 1_000_000, "malformed-json"),
    ],
)
def test_what_is_refused(raw, code):
    with pytest.raises(InvalidInput) as caught:
        parse_json(raw)
    assert caught.value.problem_code == code
    assert len(caught.value.detail) < 200


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_the_depth_ends_at_its_limit(opening, closing):
    levels = MAX_DEPTH // (2 if opening.startswith("[{") else 1)
    assert parse_json((opening * levels + "1" + closing * levels).encode())
    with pytest.raises(InvalidInput, match="nested too deeply"):
        parse_json((opening * (levels + 1) + "1" + closing * (levels + 1)).encode())


def test_brackets_in_text_are_no_nesting():
    assert parse_json(json.dumps({"a": "[" * 1000}).encode()) == {"a": "[" * 1000}


def test_a_surrogate_pair_is_one_character():
    assert parse_json(b'"\\ud83d\\ude00"') == "\N{GRINNING FACE}"
