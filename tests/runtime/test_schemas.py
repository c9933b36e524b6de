from __future__ import annotations

import datetime

import pytest

from asap.errors import InvalidInput
from asap.types import Triple
from asap_runtime.schemas import detect_schema, to_triple

GENERATION = "<think>\nfirst\n\nsecond\n</think>\n\nanswer"
ROWS = {
    "triple": {"question": "q", "cot": "first\n\nsecond", "answer": "answer"},
    "reasoning_content": {
        "prompt": "q",
        "reasoning_content": "first\n\nsecond",
        "content": "answer",
    },
    "generation": {"prompt": "q", "generation": GENERATION, "messages": []},
    "messages": {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": GENERATION},
        ]
    },
    "record": {
        "triple": {"id": "x", "question": "q", "cot": "first\n\nsecond", "answer": "answer"}
    },
}


@pytest.mark.parametrize("schema", ROWS)
def test_each_schema_is_detected_and_read(schema):
    row = ROWS[schema]
    assert detect_schema([row]) == schema
    triple = to_triple(row, schema)
    assert (triple.question, triple.cot, triple.answer) == ("q", "first\n\nsecond", "answer")


def test_the_majority_decides_and_nothing_known_is_none():
    assert detect_schema([ROWS["triple"], ROWS["messages"], ROWS["messages"]]) == "messages"
    assert detect_schema([{"text": "x"}, {}]) is None


def test_a_missing_opening_tag_is_supplied():
    row = {"prompt": "q", "generation": GENERATION.removeprefix("<think>")}
    assert to_triple(row, "generation").cot == "first\n\nsecond"


def test_messages_with_reasoning_content():
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "answer", "reasoning_content": "first"},
    ]
    assert to_triple({"messages": turns}, "messages") == Triple(
        question="q", cot="first", answer="answer"
    )


def test_question_and_answer_of_a_triple_are_untouched():
    row = {"question": " q \n", "cot": "\n c", "answer": "a\r\n "}
    triple = to_triple(row, "triple")
    assert (triple.question, triple.cot, triple.answer) == (" q \n", "\n c", "a\r\n ")


def test_other_fields_travel_as_meta_and_the_id_is_kept():
    day = datetime.date(2026, 1, 2)
    row = {**ROWS["triple"], "uuid": 7, "license": "MIT", "day": day, "nothing": None}
    triple = to_triple(row, "triple")
    assert triple.id == "7"
    assert triple.meta == {"license": "MIT", "day": "2026-01-02"}


@pytest.mark.parametrize(
    ("row", "schema", "code", "words"),
    [
        ({"question": "q", "cot": "c"}, "triple", "missing-field", "'answer'"),
        ({"question": "q", "cot": 5, "answer": "a"}, "triple", "invalid-input", "not int"),
        ({**ROWS["triple"], "cot": "a <think> b"}, "triple", "control-token-in-text", "'cot'"),
        ({**ROWS["triple"], "cot": "\ud800"}, "triple", "invalid-utf8", "surrogate"),
        ({**ROWS["triple"], "finish_reason": "length"}, "triple", "truncated-source", "cut off"),
        (
            {"prompt": "q", "generation": "a</think>b</think>c"},
            "generation",
            "malformed-think",
            "2 ",
        ),
        ({"messages": "hello"}, "messages", "invalid-input", "list"),
        (
            {"messages": [{"role": "user", "content": "q"}]},
            "messages",
            "invalid-input",
            "assistant",
        ),
        (
            {"messages": [*ROWS["messages"]["messages"][1:], *ROWS["messages"]["messages"][1:]]},
            "messages",
            "invalid-input",
            "2 user turns",
        ),
        ({"triple": {"question": "q"}}, "record", "invalid-input", "cot"),
        ({"record": "{}"}, "record", "invalid-input", "triple"),
    ],
)
def test_bad_rows_get_one_sentence_with_the_reason(row, schema, code, words):
    with pytest.raises(InvalidInput) as caught:
        to_triple(row, schema)
    assert caught.value.problem_code == code
    assert words in caught.value.detail
    assert "\n" not in caught.value.detail
