"""Refusals, keys and addresses: what ends a call at once, and what never shows."""

from __future__ import annotations

import base64
import traceback

import pytest

from asap.errors import Misconfigured, UpstreamError, UpstreamUnavailable
from asap_anchor.chat import OPENAI_URL, OpenAIChat
from openai_server import Body, Drop, OpenAIServer, Reply, Stall, Status
from waiting import PATIENCE_S

KEY = "sk-secret-0123456789"
PROMPT = "a private prompt"


def everything_about(error: BaseException) -> str:
    """All a log of this exception could show, its hidden causes included."""
    parts = []
    while error is not None:
        parts += [repr(error), str(vars(error)), *traceback.format_exception(error)]
        error = error.__cause__ or error.__context__
    return "\n".join(parts)


# Refusals that no retry helps


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413, 422])
async def test_other_client_errors_end_the_call_at_once(chat_for, sampling, status):
    async with OpenAIServer([Status(status)]) as server:
        with pytest.raises(UpstreamError, match=str(status)) as caught:
            await chat_for(server).complete(PROMPT, sampling)

    assert type(caught.value) is UpstreamError
    assert not caught.value.retryable
    assert caught.value.context["status"] == status
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "fault", [Status(401), Status(429), Stall(), Drop(), Body(PROMPT.encode())], ids=str
)
async def test_neither_key_nor_prompt_nor_reply_shows_in_an_error(chat_for, sampling, fault):
    async with OpenAIServer([fault]) as server:
        chat = chat_for(server, max_transport=1, timeout_s=0.2 if fault == Stall() else PATIENCE_S)
        with pytest.raises(UpstreamError) as caught:
            await chat.complete(PROMPT, sampling)

    shown = everything_about(caught.value)
    assert KEY not in shown
    assert PROMPT not in shown


async def test_the_key_does_not_show_in_the_client(chat_for):
    chat = chat_for("http://localhost:1/v1")

    assert KEY not in repr(chat)
    assert KEY not in str(vars(chat))


async def test_a_password_in_the_base_url_does_not_show(chat_for, sampling):
    async with OpenAIServer([Status(401)]) as server:
        chat = chat_for(server.base_url.replace("//", "//user:pass-word@"))
        with pytest.raises(UpstreamError) as caught:
            await chat.complete(PROMPT, sampling)

    assert "pass-word" not in everything_about(caught.value)
    credentials = server.requests[0].headers["Authorization"]
    assert base64.b64decode(credentials.removeprefix("Basic ")) == b"user:pass-word"


@pytest.mark.parametrize("key", ["", " \n", "two\nzzqq", "zzqqé", "\x00zzqq"])
async def test_a_key_that_http_cannot_carry_is_refused_at_the_start(chat_for, key):
    with pytest.raises(Misconfigured) as caught:
        chat_for("http://localhost:1/v1", api_key=key)

    assert "zzqq" not in everything_about(caught.value)


async def test_the_newline_that_a_key_file_ends_in_is_dropped(chat_for, sampling):
    async with OpenAIServer([Reply("x")]) as server:
        await chat_for(server, api_key=KEY + "\n").complete(PROMPT, sampling)

    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "base_url",
    ["/v1", "localhost:8000/v1", "ftp://h/v1", "http:///v1", "http://h:99999/v1", "http://[h/v1"],
)
async def test_a_base_url_that_cannot_work_is_refused_at_the_start(chat_for, base_url):
    with pytest.raises(Misconfigured):
        chat_for(base_url)


async def test_no_base_url_is_openai_itself(chat_for, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere/v1")

    chat = chat_for(OPENAI_URL)
    default = OpenAIChat(base_url=None, api_key=KEY, model="tiny")
    await default.close()

    assert default._transport._base_url == chat._transport._base_url


async def test_a_proxy_of_the_environment_is_asked_for_the_server(chat_for, sampling, monkeypatch):
    async with OpenAIServer([Reply("by proxy")]) as proxy:
        monkeypatch.setenv("http_proxy", proxy.base_url.removesuffix("/v1"))
        monkeypatch.setenv("no_proxy", "")
        chat = chat_for("http://llm.invalid/v1")
        assert (await chat.complete(PROMPT, sampling)).text == "by proxy"


async def test_a_server_that_needs_no_proxy_is_asked_itself(chat_for, sampling, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    async with OpenAIServer([Reply("itself")]) as server:
        assert (await chat_for(server).complete(PROMPT, sampling)).text == "itself"


@pytest.mark.parametrize("status", [Status(402), Status(429, code="insufficient_quota")], ids=str)
async def test_an_account_without_credit_is_not_tried_again(chat_for, sampling, status):
    async with OpenAIServer([status]) as server:
        with pytest.raises(UpstreamUnavailable, match="credit") as caught:
            await chat_for(server).complete(PROMPT, sampling)

    assert len(server.requests) == 1
    assert caught.value.context["waits"]
