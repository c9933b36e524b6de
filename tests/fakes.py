"""Scripted ports: a chat model that plays replies, a scorer that reads a table. No model behind
them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from asap.config import ScoreName
from asap.ports import ChatResult, Sampling, ScoreRequest
from asap.surprisal import build_context
from asap.types import StepScores, Usage


class ScriptedChat:
    """Plays `replies` in order (text, ChatResult or exception), or asks a function of the
    prompt.
    """

    name = "scripted"

    def __init__(
        self, *replies: str | ChatResult | Exception, answer: Callable[[str], str] | None = None
    ):
        self._replies = list(replies)
        self._answer = answer
        self.prompts: list[str] = []
        self.samplings: list[Sampling] = []

    async def complete(self, prompt: str, sampling: Sampling) -> ChatResult:
        await asyncio.sleep(0)
        self.prompts.append(prompt)
        self.samplings.append(sampling)
        reply = self._answer(prompt) if self._answer else self._replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply if isinstance(reply, ChatResult) else said(reply)


def said(text: str, finish_reason: str = "stop") -> ChatResult:
    """A reply with plausible usage."""
    usage = Usage(calls=1, prompt_tokens=10, completion_tokens=len(text) // 4, cost_usd=0.001)
    return ChatResult(text, finish_reason, usage)


def count_words(text: str) -> int:
    """The toy tokenizer: one token per word and one per separator."""
    return len(text.split()) + text.count("\n\n")


@dataclass(frozen=True)
class CountedRequest:
    """What `TableScorer` prepares: a request and its tokens, question and think mark included."""

    request: ScoreRequest
    tokens: int


class TableScorer:
    """Scores by a function of (question, steps); one token per word, a separator is one token."""

    name = "table"
    tokenizer_name = "words"
    offers = frozenset(get_args(ScoreName))

    def __init__(self, score: Callable[[Sequence[str]], Sequence[float | None]]):
        self._score = score
        self.requests: list[ScoreRequest] = []

    def count(self, text: str) -> int:
        return count_words(text)

    def prepare(self, request: ScoreRequest) -> CountedRequest:
        text = build_context(request.question, request.steps, request.context).text
        return CountedRequest(request, self.count(text) if request.scores else 0)

    async def score_prepared(self, prepared: Sequence[CountedRequest]) -> list[StepScores]:
        return await self.score([one.request for one in prepared])

    async def score(self, requests: Sequence[ScoreRequest]) -> list[StepScores]:
        self.requests += requests
        return [
            StepScores(
                scores={name: tuple(self._score(request.steps)) for name in request.scores},
                tokens=tuple(count_words(step) for step in request.steps),
                tokens_joined=tuple(count_words(step) + 1 for step in request.steps),
                total=count_words("\n\n".join(request.steps)),
            )
            for request in requests
        ]


def rows(path: Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
