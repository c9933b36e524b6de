"""Stage 1 whole (§3.2): the direct CoT, the coarse CoT guided by it, the proof, and bounded
retries.

Whatever the protocol, what comes out is proved to stand in the source: a rewritten reply by
Algorithm 1 or by word alignment, selected steps by being the source's own. Attempts that fail are
kept with their reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from asap.codesplit import is_code
from asap.config import PruneConfig
from asap.errors import CoarseExhausted, InvalidInput
from asap.extractive import select_steps
from asap.fences import find_fences
from asap.ports import ChatModel, ChatResult, Sampling
from asap.prompts import (
    KEEP_SCHEMA,
    answer_in_prompt,
    clean_reply,
    coarse_prompt,
    direct_prompt,
    parse_selection,
    select_prompt,
)
from asap.proof import prove_reply, prove_steps
from asap.types import Attempt, CoarseBlock, MatchReport, Record
from asap.windows import clip, rough_tokens, split_windows

__all__ = ["coarse_prune"]

EXTRACTIVE = "extractive"
_CUT = frozenset({"length", "content_filter", "insufficient_system_resource", "error", "abort"})
"""What servers say of a reply that ends before its end; OpenAI, DeepSeek, routers, vLLM."""
Outcome = Literal["accepted", "empty", "truncated", "unparsable", "invalid"]


async def coarse_prune(record: Record, chat: ChatModel | None) -> Record:
    """The record with its `coarse` block. `chat` may be None for the extractive anchor only.

    A sample that no attempt could prune falls back to the original (`on_fail="original"`) or is
    rejected (`drop`, stored as status, so that a batch goes on). Transport errors of `chat` pass
    through.
    """
    if not record.source_steps:
        return record
    if record.config.anchor == "extractive":
        if record.config.method == "direct":
            raise InvalidInput(
                "method 'direct' is the LLM's own text: it needs an LLM, not the extractive anchor"
            )
        return record.with_coarse(_extract(record))
    if chat is None:
        raise InvalidInput("stage 1 needs an LLM (or anchor='extractive')")
    run = _Stage1(record, chat, [])
    return record.with_coarse(await run.block())


def _extract(record: Record) -> CoarseBlock:
    config = record.config
    kept = select_steps(record.source_steps, record.triple.answer, config.extractive_keep)
    kept = _with_code(record, kept)
    return CoarseBlock(
        protocol="extractive",
        model=EXTRACTIVE,
        kept=kept,
        status="accepted",
        flags=_gain_flag(record, kept),
    )


def _with_code(record: Record, kept: Iterable[int]) -> tuple[int, ...]:
    """The kept steps, and those that hold code where they are protected."""
    if not record.config.protect_code:
        return tuple(kept)
    code = (i for i, step in enumerate(record.source_steps) if _holds_code(step))
    return tuple(sorted({*kept, *code}))


def _holds_code(step: str) -> bool:
    return bool(find_fences(step.split("\n"))) or is_code(step)


def _gain_flag(record: Record, kept: tuple[int, ...]) -> tuple[str, ...]:
    return ("no_coarse_gain",) if len(kept) == len(record.source_steps) else ()


@dataclass(slots=True)
class _Stage1:
    """One record on its way through stage 1; `attempts` grows with every reply."""

    record: Record
    chat: ChatModel
    attempts: list[Attempt]

    @property
    def config(self) -> PruneConfig:
        return self.record.config

    async def block(self) -> CoarseBlock:
        answer = answer_in_prompt(self.record.triple.answer, self.config.answer_code)
        if answer is None and self.config.require_code:
            raise InvalidInput(
                f"the answer of {self.record.id!r} holds no fenced Python block (require_code)",
                code="no-code",
            )
        prompt = direct_prompt(
            self.record.triple.question,
            self.record.triple.answer if answer is None else answer,
            code=answer is not None,
            wording=self.config.wording,
            fence_safety=self.config.fence_safety,
        )
        direct_cot = await self._direct(prompt)
        if direct_cot is None:
            return self._exhausted(None, prompt)
        if self.config.method == "direct":
            return CoarseBlock(
                protocol="direct",
                model=self.chat.name,
                direct_cot=direct_cot,
                text=direct_cot,
                status="accepted",
                attempts=tuple(self.attempts),
                prompt_sha256=_sha256(prompt),
            )
        return await self._coarse(direct_cot)

    async def _direct(self, prompt: str) -> str | None:
        for number in range(1, self.config.max_attempts + 1):
            result = await self._ask(prompt, number, self.config.direct_temperature)
            outcome = _unusable(result) or "accepted"
            self._note("direct", number, result, outcome)
            if outcome == "accepted":
                return result.text.strip()
        return None

    async def _coarse(self, direct_cot: str) -> CoarseBlock:
        if self.config.protocol == "select":
            return await self._select(direct_cot)
        prompt = coarse_prompt(
            self.record.triple.cot,
            direct_cot,
            wording=self.config.wording,
            fence_safety=self.config.fence_safety,
        )
        for number in range(1, self.config.max_attempts + 1):
            result = await self._ask(prompt, number, self._rewrite_temperature(number))
            report = self._read_rewrite(number, result)
            if report is not None and report.valid:
                return self._accepted(direct_cot, prompt, report, text=clean_reply(result.text))
        return self._exhausted(direct_cot, prompt)

    def _rewrite_temperature(self, number: int) -> float:
        ladder = (self.config.rewrite_temperature, *self.config.rewrite_ladder)
        return ladder[min(number, len(ladder)) - 1]

    async def _select(self, direct_cot: str) -> CoarseBlock:
        """Each window is chosen from on its own; a step shown twice stays when one choice keeps
        it.
        """
        steps, room = self.record.source_steps, self._window_room(direct_cot)
        windows = split_windows(steps, room)
        kept: set[int] = set()
        prompts = []
        for window in windows:
            shown = [steps[i] if room is None else clip(steps[i], room) for i in window]
            prompt = select_prompt(
                shown,
                direct_cot,
                first=window.start + 1,
                total=len(steps),
                fence_safety=self.config.fence_safety,
            )
            prompts.append(prompt)
            report = await self._choose(prompt, window)
            if report is None:
                return self._exhausted(direct_cot, prompt)
            kept |= set(report.kept)
        # The share of a trace in windows is known only now.
        report = prove_steps(self.record, tuple(sorted(kept)))
        if not report.valid:
            return self._exhausted(direct_cot, prompts[-1])
        return self._accepted(direct_cot, "\n".join(prompts), report)

    def _window_room(self, direct_cot: str) -> int | None:
        """Tokens for steps, beside template, direct CoT and reply."""
        context = self.config.context_tokens
        if context is None:
            return None
        reply = min(self.config.max_reply_tokens, context // 4)
        room = context - reply - rough_tokens(select_prompt([], direct_cot, total=1))
        if room < context // 8:
            raise InvalidInput(
                f"context_tokens={context} is too small: the direct CoT of {self.record.id!r} "
                "leaves no room for the steps",
                code="text-too-long",
            )
        return room

    async def _choose(self, prompt: str, window: range) -> MatchReport | None:
        """The steps that the LLM keeps of one window; None when no attempt was valid."""
        for number in range(1, self.config.max_attempts + 1):
            result = await self._ask(prompt, number, self.config.select_temperature, schema=True)
            report = self._read_selection(number, result, window)
            if report is not None and report.valid:
                return report
        return None

    async def _ask(
        self, prompt: str, number: int, temperature: float, *, schema: bool = False
    ) -> ChatResult:
        max_tokens = self.config.max_reply_tokens
        if self.config.context_tokens is not None:
            left = self.config.context_tokens - rough_tokens(prompt)
            if left < 1:  # any reply would be cut, and each is paid for
                raise InvalidInput(
                    f"context_tokens={self.config.context_tokens} is too small for the prompt of "
                    f"{self.record.id!r}; protocol 'select' shows a long CoT in windows",
                    code="text-too-long",
                )
            max_tokens = min(max_tokens, left)
        sampling = Sampling(
            temperature=temperature,
            max_tokens=max_tokens,
            seed=self.config.seed + number,
            json_schema=KEEP_SCHEMA if schema else None,
        )
        return await self.chat.complete(prompt, sampling)

    def _read_selection(self, number: int, result: ChatResult, window: range) -> MatchReport | None:
        outcome: Outcome | None = _unusable(result)
        report = None
        if outcome is None:
            part = len(window) < len(self.record.source_steps)
            numbers = parse_selection(
                result.text, window.stop, first=window.start + 1, may_be_empty=part
            )
            kept = tuple(n - 1 for n in numbers or ())
            if numbers is None:
                outcome = "unparsable"
            elif part:
                report = MatchReport(match="exact", valid=True, kept=kept)
            else:
                report = prove_steps(self.record, kept)
        self._note("coarse", number, result, outcome or _verdict(report), report)
        return report

    def _read_rewrite(self, number: int, result: ChatResult) -> MatchReport | None:
        outcome, report = _unusable(result), None
        if outcome is None:
            report = prove_reply(result.text, self.record)
        self._note("coarse", number, result, outcome or _verdict(report), report)
        return report

    def _note(
        self,
        purpose: Literal["direct", "coarse"],
        number: int,
        result: ChatResult,
        outcome: Outcome,
        report: MatchReport | None = None,
    ) -> None:
        self.attempts.append(
            Attempt(
                purpose=purpose,
                number=number,
                outcome=outcome,
                report=report,
                reply_chars=len(result.text),
                usage=result.usage,
            )
        )

    def _accepted(
        self, direct_cot: str, prompt: str, report: MatchReport, text: str | None = None
    ) -> CoarseBlock:
        own_text = text is not None and self.config.project == "llm_text"
        kept = report.kept if own_text else _with_code(self.record, report.kept)
        return CoarseBlock(
            protocol=self.config.protocol,
            model=self.chat.name,
            direct_cot=direct_cot,
            kept=None if own_text else kept,
            text=text if own_text else None,
            status="accepted",
            attempts=tuple(self.attempts),
            flags=_gain_flag(self.record, kept),
            prompt_sha256=_sha256(prompt),
        )

    def _exhausted(self, direct_cot: str | None, prompt: str) -> CoarseBlock:
        status: Literal["fallback_original", "rejected"] = (
            "fallback_original" if self.config.on_fail == "original" else "rejected"
        )
        return CoarseBlock(
            protocol=self.config.protocol,
            model=self.chat.name,
            direct_cot=direct_cot,
            status=status,
            attempts=tuple(self.attempts),
            flags=(CoarseExhausted.code.replace("-", "_"),),
            prompt_sha256=_sha256(prompt),
        )


def _unusable(result: ChatResult) -> Literal["empty", "truncated"] | None:
    if not result.text.strip() and result.finish_reason != "length":
        return "empty"
    return "truncated" if result.finish_reason in _CUT else None


def _verdict(report: MatchReport | None) -> Literal["accepted", "invalid"]:
    return "accepted" if report is not None and report.valid else "invalid"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
