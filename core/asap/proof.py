"""The proof of stage 1 (§3.2): what a reply keeps stands in the source, in order."""

from __future__ import annotations

from collections.abc import Sequence

from asap.alignment import match_by_alignment
from asap.config import PruneConfig
from asap.gestalt import StepMatcher, match_in_order
from asap.prompts import clean_reply
from asap.steps import split_steps
from asap.types import MatchReport, Record

__all__ = ["prove_reply", "prove_steps"]


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
        steps = split_steps(text, config.split)
        report = match_in_order(
            source,
            steps,
            tau=config.tau,
            autojunk=config.autojunk,
            containment=config.containment,
        )
        if not report.valid and steps:
            report = _with_nearest(report, source, steps, config)
    return _check_share(report, text, record)


def _with_nearest(
    report: MatchReport, source: Sequence[str], steps: Sequence[str], config: PruneConfig
) -> MatchReport:
    """The refusal with the source step that came nearest to the reply step that failed."""
    # Each reply step before it has taken one source step.
    matcher = StepMatcher(steps[len(report.kept)].strip(), autojunk=config.autojunk)
    best, nearest = 0.0, None
    for i in range(report.kept[-1] + 1 if report.kept else 0, len(source)):
        step = source[i].strip()
        # At the best ratio so far most pairs are refused without being matched.
        if matched := matcher.matched(step, best):
            ratio = 2.0 * matched / (len(step) + len(steps[len(report.kept)].strip()))
            if ratio > best:
                best, nearest = ratio, i
    if nearest is None:
        return report
    reason = f"{report.reason}; the nearest, step {nearest + 1}, has a ratio of {best:.2f}"
    reason = f"{reason}, {config.tau:.2f} is needed"
    return report.model_copy(update={"reason": reason, "similarity": best})


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


def prove_steps(record: Record, kept: tuple[int, ...]) -> MatchReport:
    """The same proof for chosen steps: Algorithm 1 at tau = 1 on the steps themselves."""
    chosen = [record.source_steps[i] for i in kept]
    report = match_in_order(record.source_steps, chosen, tau=1.0)
    exact = report.model_copy(update={"match": "exact", "kept": kept})
    return _check_share(exact, " ".join(chosen), record)
