from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asap_gateway.live.edits import Separator, collect, separate_answer
from asap_gateway.live.requests import read_request
from asap_gateway.live.think_splitter import split_thinking

TEXTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</th", "ink>", " ", "\n", "a", "é"]), max_size=10
)


def chat_chunk(text, finish=None, index=0, **delta):
    choice = {"index": index, "delta": {"content": text, **delta}, "finish_reason": finish}
    return {"id": "1", "created": 1, "model": "m", "choices": [choice]}


def separated(chunks, *, opened=True):
    separator = Separator(opened=opened)
    return [edited for one in chunks if (edited := separator.edit(one)) is not None]


def joined(chunks, name, index=0):
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(c["delta"].get(name) or "" for c in choices if c["index"] == index)


@given(pieces=TEXTS, opened=st.booleans())
def test_chunks_put_together_are_the_whole_text_taken_apart(pieces, opened):
    chunks = [*map(chat_chunk, pieces), chat_chunk("", "stop")]
    edited = separated(chunks, opened=opened)
    wanted = split_thinking("".join(pieces), opened=opened)
    assert (joined(edited, "reasoning_content"), joined(edited, "content")) == wanted
    assert edited[-1]["choices"][0]["finish_reason"] == "stop"


@given(pieces=TEXTS)
def test_choices_do_not_mix(pieces):
    chunks = [chat_chunk(piece, index=index) for piece in pieces for index in (0, 1)]
    chunks += [chat_chunk("", "stop", index) for index in (0, 1)]
    edited = separated(chunks)
    for name in ("reasoning_content", "content"):
        assert joined(edited, name, 0) == joined(edited, name, 1)


def test_nothing_empty_is_sent_but_the_beginning():
    begun = chat_chunk("", role="assistant")
    edited = separated([begun, chat_chunk("</th"), chat_chunk("ink>\n"), chat_chunk("b")])
    deltas = [chunk["choices"][0]["delta"] for chunk in edited]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "b"}]


def test_what_is_no_text_passes():
    call = [{"index": 0, "function": {"name": "f"}}]
    [edited] = separated([chat_chunk(None, tool_calls=call)])
    assert edited["choices"][0]["delta"] == {"tool_calls": call}
    assert separated([{"choices": [], "usage": {}}]) == [{"choices": [], "usage": {}}]


def test_an_answer_that_came_apart_stays_so():
    message = {"role": "assistant", "content": "b", "reasoning": "a"}
    [choice] = separate_answer({"choices": [{"message": message}]}, opened=True)["choices"]
    assert choice["message"] == message


async def test_chunks_are_collected_into_one_answer():
    async def source():
        for chunk in separated([chat_chunk("a"), chat_chunk("</think>b"), chat_chunk("", "stop")]):
            yield chunk
        yield {"choices": [], "usage": {"completion_tokens": 3}}

    ask = {"model": "m", "messages": [{}], "thinking": {"format": "separate"}}
    answer = await collect(read_request("chat/completions", ask), source())
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "b", "reasoning_content": "a"}
    assert (choice["finish_reason"], answer["object"]) == ("stop", "chat.completion")
    assert answer["usage"] == {"completion_tokens": 3}
