"""Stage 1 whole (§3.2): the direct CoT, the coarse CoT guided by it, the proof, and bounded
retries.

Whatever the protocol, what comes out is proved to stand in the source: a rewritten reply by
Algorithm 1 or by word alignment, selected steps by being the source's own. Attempts that fail are
kept with their reason.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from asap.alignment import match_by_alignment
from asap.config import PruneConfig
from asap.errors import CoarseExhausted, InvalidInput
from asap.extractive import select_steps
from asap.gestalt import match_in_order
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
from asap.steps import split_steps
from asap.types import Attempt, CoarseBlock, MatchReport, Record

__all__ = ["coarse_prune", "prove_reply"]

EXTRACTIVE = "extractive"
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


def prove_reply(reply: str, record: Record) -> MatchReport:
    """The verdict on a rewritten reply by the record's configuration; expected refusals are
    values.
    """
    config, source = record.config, record.source_steps
    text = clean_reply(reply)
    if config.match == "align":
        report = match_by_alignment(
            source, text, fidelity=config.fidelity, step_share=config.step_share
        )
    else:
        report = match_in_order(
            source,
            split_steps(text, config.split),
            tau=config.tau,
            autojunk=config.autojunk,
            containment=config.containment,
        )
    return _check_share(report, text, record)


def _check_share(report: MatchReport, text: str, record: Record) -> MatchReport:
    """`min_keep` in words: stage 1 has no tokenizer, and one matching step must not pass for a
    trace.
    """
    if not report.valid:
        return report
    if record.config.project == "origin_steps":
        text = " ".join(record.source_steps[i] for i in report.kept)
    share = len(text.split()) / max(len(record.triple.cot.split()), 1)
    if share >= record.config.min_keep:
        return report
    reason = f"keeps {share:.1%} of the words, {record.config.min_keep:.0%} are needed"
    return report.model_copy(update={"valid": False, "reason": reason})


def _prove_steps(record: Record, kept: tuple[int, ...]) -> MatchReport:
    """The same proof for chosen steps: Algorithm 1 at tau = 1 on the steps themselves."""
    chosen = [record.source_steps[i] for i in kept]
    report = match_in_order(record.source_steps, chosen, tau=1.0)
    exact = report.model_copy(update={"match": "exact", "kept": kept})
    return _check_share(exact, " ".join(chosen), record)


def _extract(record: Record) -> CoarseBlock:
    config = record.config
    kept = select_steps(record.source_steps, record.triple.answer, config.extractive_keep)
    return CoarseBlock(
        protocol="extractive",
        model=EXTRACTIVE,
        kept=kept,
        status="accepted",
        flags=_gain_flag(record, kept),
    )


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
        select = self.config.protocol == "select"
        safety = self.config.fence_safety
        if select:
            prompt = select_prompt(self.record.source_steps, direct_cot, fence_safety=safety)
        else:
            think, wording = self.record.triple.cot, self.config.wording
            prompt = coarse_prompt(think, direct_cot, wording=wording, fence_safety=safety)
        for number in range(1, self.config.max_attempts + 1):
            if select:
                result = await self._ask(
                    prompt, number, self.config.select_temperature, schema=True
                )
                report = self._read_selection(number, result)
            else:
                result = await self._ask(prompt, number, self.config.rewrite_temperature)
                report = self._read_rewrite(number, result)
            if report is not None and report.valid:
                return self._accepted(direct_cot, prompt, result, report)
        return self._exhausted(direct_cot, prompt)

    async def _ask(
        self, prompt: str, number: int, temperature: float, *, schema: bool = False
    ) -> ChatResult:
        sampling = Sampling(
            temperature=temperature,
            max_tokens=self.config.max_reply_tokens,
            seed=self.config.seed + number,
            json_schema=KEEP_SCHEMA if schema else None,
        )
        return await self.chat.complete(prompt, sampling)

    def _read_selection(self, number: int, result: ChatResult) -> MatchReport | None:
        outcome: Outcome | None = _unusable(result)
        report = None
        if outcome is None:
            numbers = parse_selection(result.text, len(self.record.source_steps))
            if numbers is None:
                outcome = "unparsable"
            else:
                report = _prove_steps(self.record, tuple(n - 1 for n in numbers))
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
        self, direct_cot: str, prompt: str, result: ChatResult, report: MatchReport
    ) -> CoarseBlock:
        own_text = self.config.protocol == "rewrite" and self.config.project == "llm_text"
        return CoarseBlock(
            protocol=self.config.protocol,
            model=self.chat.name,
            direct_cot=direct_cot,
            kept=None if own_text else report.kept,
            text=clean_reply(result.text) if own_text else None,
            status="accepted",
            attempts=tuple(self.attempts),
            flags=_gain_flag(self.record, report.kept),
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
    if result.finish_reason == "length":
        return "truncated"
    return None if result.text.strip() else "empty"


def _verdict(report: MatchReport | None) -> Literal["accepted", "invalid"]:
    return "accepted" if report is not None and report.valid else "invalid"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
