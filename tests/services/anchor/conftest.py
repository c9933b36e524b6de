"""An OpenAIChat for a scripted server: everything as in production, but quick to try again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from asap.ports import ChatResult, Sampling
from asap_anchor.chat import OpenAIChat
from openai_server import OpenAIServer
from waiting import PATIENCE_S

KEY = "sk-secret-0123456789"


@pytest.fixture
def sampling() -> Sampling:
    return Sampling(temperature=2.0, max_tokens=64, seed=7)


class Counted:
    """A `measure` that knows how many requests were under way at once, as the client sees it: a
    server may be late to take them up, and late to see that one was given up.
    """

    def __init__(self) -> None:
        self.now = self.most = 0

    async def __call__(self, model: str, request: Awaitable[ChatResult]) -> ChatResult:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            return await request
        finally:
            self.now -= 1


@pytest.fixture
def requests_at_once() -> Counted:
    return Counted()


@pytest.fixture
async def chat_for() -> AsyncIterator[Callable[..., OpenAIChat]]:
    """Makes a client of a server (or a base URL), closed at the end of the test."""
    made: list[OpenAIChat] = []

    def make(server: OpenAIServer | str, **arguments) -> OpenAIChat:
        base_url = server if isinstance(server, str) else server.base_url
        quick = {"timeout_s": PATIENCE_S, "backoff_base_s": 0.01, "backoff_cap_s": 1.0}
        chat = OpenAIChat(
            base_url=base_url,
            **{"api_key": KEY, "model": "tiny"} | quick | arguments,
        )
        made.append(chat)
        return chat

    yield make
    for chat in made:
        await chat.close()
