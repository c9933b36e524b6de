"""In-order word alignment of a rewritten reply with its source (`match="align"`, ours, not the
paper's).

Algorithm 1 compares whole steps, so a reply that cuts sentences inside a paragraph, or joins
paragraphs, fails although every word of it is the source's. Here the words of the whole reply are
aligned with the words of the whole CoT, in order: the longest common subsequence, then slid so that
words stand together. Case, punctuation, paragraphs and one leading line such as "Here is the
compressed thinking:" do not matter; paraphrase, reordering and invention leave words without a
place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz.distance import LCSseq

from asap.types import MatchReport

__all__ = ["align_words", "match_by_alignment"]

_WORD = re.compile(r"\w+")
# A complete reply ends a sentence or a line, its own or the source's. A colon or comma does not end
# one.
_SENTENCE_END = re.compile(r"""[.!?…。！？)\]}`"'”’$|*_]""")
_PREAMBLE = re.compile(r"[^\n]{1,120}:[ \t*]*\n")

# A paragraph must also stand on its own, in runs of two words and more: without this a swapped or
# invented one hides in a long reply (accepted 40 and 47 times in 100 random edits, with it 1 and
# 0). Below twelve words chance decides, and faithful replies were seen to move a sentence of ten.
_LONG_PARAGRAPH = 12
_PREAMBLE_WORDS = 15


@dataclass(frozen=True, slots=True)
class _Words:
    """Words of several texts in a row, lower-cased; `owner[i]` is the text that word i belongs
    to.
    """

    words: list[str]
    owner: list[int]

    @classmethod
    def of(cls, texts: Sequence[str]) -> _Words:
        words: list[str] = []
        owner: list[int] = []
        for i, text in enumerate(texts):
            found = [match.group().lower() for match in _WORD.finditer(text)]
            words += found
            owner += [i] * len(found)
        return cls(words, owner)


def match_by_alignment(
    source_steps: Sequence[str],
    reply: str,
    *,
    fidelity: float = 0.95,
    step_share: float = 0.5,
) -> MatchReport:
    """Accept a reply whose words stand in the source in order; keep the source steps that it
    covers.

    Valid when (1) at least `fidelity` of the reply's words are aligned, (2) each paragraph of
    twelve words and more has `step_share` of them aligned in runs of two and more, (3) the reply
    does not stop inside a sentence, (4) some source step has `step_share` of its words aligned;
    those steps are kept. A step without words (a rule, a bracket) is kept with the step before it.

    Time and memory O(|source words| |reply words| / 64), bit-parallel: 2,000 against 600 words take
    1 ms.
    """
    paragraphs = [p for p in re.split(r"\n[ \t]*\n", reply) if p.strip()]
    source = _Words.of(source_steps)
    target = _Words.of(paragraphs)
    if not target.words:
        return MatchReport(match="align", valid=False, reason="the reply has no word")
    runs = align_words(source.words, target.words)
    run_length = [0] * len(target.words)
    covered = [0] * len(source_steps)
    for source_at, target_at, size in runs:
        run_length[target_at : target_at + size] = [size] * size
        for i in range(source_at, source_at + size):
            covered[source.owner[i]] += 1
    skipped = _preamble_words(reply, run_length)
    aligned = run_length[skipped:]
    share = sum(size > 0 for size in aligned) / max(len(aligned), 1)
    kept = _covered_steps(source, len(source_steps), covered, step_share)
    reason = similarity = None
    if share < fidelity:
        worst, similarity = _worst_paragraph(target, run_length, skipped)
        reason = (
            f"{share:.1%} of the reply's words stand in the source in order, {fidelity:.0%} are "
            f"needed; paragraph {worst + 1} of {len(paragraphs)} has the fewest, {similarity:.1%}"
        )
    elif (foreign := _foreign_paragraph(target, run_length, skipped, step_share)) is not None:
        at, similarity = foreign
        reason = (
            f"paragraph {at + 1} of {len(paragraphs)} does not stand in the source in order: "
            f"{similarity:.1%} of its words do, {step_share:.0%} are needed"
        )
    elif _stops_inside_sentence(source_steps, reply, runs, len(target.words)):
        reason = "the reply stops inside a sentence"
    elif not kept:
        reason = "the reply covers no step of the source"
    return MatchReport(
        match="align",
        valid=reason is None,
        reason=reason,
        kept=kept,
        similarity=None if similarity is None else round(similarity, 6),
        fidelity=round(share, 6),
    )


def align_words(source: Sequence[str], target: Sequence[str]) -> list[tuple[int, int, int]]:
    """Runs (source index, target index, length) of a longest common subsequence, in order.

    A longest common subsequence is not unique: a word may be taken from an earlier paragraph that
    happens to hold it. Each run that also stands directly before or behind its neighbour is joined
    to it. On random subsets of real traces this halves the steps that are wrongly kept or dropped.
    """
    runs: list[tuple[int, int, int]] = []
    for op in LCSseq.opcodes(source, target):
        if op.tag != "equal":
            continue
        at, to, size = op.src_start, op.dest_start, op.src_end - op.src_start
        while runs and runs[-1][1] + runs[-1][2] == to:
            before, before_to, before_size = runs[-1]
            behind = before + before_size
            if at >= before_size and source[at - before_size : at] == target[before_to:to]:
                at, to, size = at - before_size, before_to, before_size + size
            elif source[behind : behind + size] == target[to : to + size]:
                at, to, size = before, before_to, before_size + size
            else:
                break
            runs.pop()
        runs.append((at, to, size))
    return runs


def _preamble_words(reply: str, run_length: Sequence[int]) -> int:
    """Number of words of a leading "Here is …:" line that the source does not hold, else 0."""
    line = _PREAMBLE.match(reply.lstrip())
    if line is None:
        return 0
    size = len(_WORD.findall(line.group()))
    aligned = sum(run > 1 for run in run_length[:size])
    return size if size <= _PREAMBLE_WORDS and 2 * aligned < size else 0


def _covered_steps(
    source: _Words, steps: int, covered: Sequence[int], step_share: float
) -> tuple[int, ...]:
    sizes = [0] * steps
    for step in source.owner:
        sizes[step] += 1
    kept: list[int] = []
    for step in range(steps):
        if sizes[step]:
            keep = covered[step] > 0 and covered[step] >= step_share * sizes[step]
        else:
            keep = bool(kept) and kept[-1] == step - 1
        if keep:
            kept.append(step)
    return tuple(kept)


def _foreign_paragraph(
    target: _Words, run_length: Sequence[int], skipped: int, step_share: float
) -> tuple[int, float] | None:
    """The first long paragraph that does not stand on its own, and its share of words in runs of
    two and more.
    """
    shares = _paragraph_shares(target, run_length, skipped, least_run=2)
    for paragraph, (size, aligned) in shares.items():
        if size >= _LONG_PARAGRAPH and aligned < step_share * size:
            return paragraph, aligned / size
    return None


def _worst_paragraph(target: _Words, run_length: Sequence[int], skipped: int) -> tuple[int, float]:
    """The paragraph with the least share of aligned words, and that share."""
    shares = _paragraph_shares(target, run_length, skipped, least_run=1)
    ranked = ((aligned / size, paragraph) for paragraph, (size, aligned) in shares.items())
    share, paragraph = min(ranked, default=(0.0, 0))
    return paragraph, share


def _paragraph_shares(
    target: _Words, run_length: Sequence[int], skipped: int, *, least_run: int
) -> dict[int, tuple[int, int]]:
    """Words of each paragraph, and how many of them stand in runs of at least so many."""
    found: dict[int, tuple[int, int]] = {}
    for i in range(skipped, len(target.words)):
        size, aligned = found.get(target.owner[i], (0, 0))
        found[target.owner[i]] = size + 1, aligned + (run_length[i] >= least_run)
    return found


def _stops_inside_sentence(
    source_steps: Sequence[str],
    reply: str,
    runs: Sequence[tuple[int, int, int]],
    words: int,
) -> bool:
    """The reply's end has no closing mark, and the source goes on behind the last word on its
    line.
    """
    tail = reply[max((match.end() for match in _WORD.finditer(reply)), default=0) :]
    if _SENTENCE_END.search(tail):
        return False
    if not runs or runs[-1][1] + runs[-1][2] != words:
        return True  # the last word is no whole word of the source
    last = runs[-1][0] + runs[-1][2] - 1
    for step in source_steps:
        matches = list(_WORD.finditer(step))
        if last < len(matches):
            behind = step[matches[last].end() :]
            gap = behind[: len(behind) - len(behind.lstrip())] + behind.lstrip()[:1]
            return bool(behind.strip()) and "\n" not in gap and not _SENTENCE_END.match(gap.strip())
        last -= len(matches)
    return False
