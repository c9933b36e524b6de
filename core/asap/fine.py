"""Stage 2 whole (§3.3, Algorithm 2): score the steps of C_coarse, remove the least surprising ones.

`fine_prune` awaits a Scorer; `rebudget` is pure and needs no model, because scores and counts stay
on the record.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import get_args

from asap.config import PruneConfig, ScoreName
from asap.errors import InvalidInput
from asap.methods import get_method
from asap.ports import Scorer, ScoreRequest, ScoreSession, TokenCounter
from asap.selection import Selection, remove_lowest, token_budget
from asap.steps import join_steps
from asap.types import FineBlock, Record, StepScores, TokenCounts

__all__ = ["count_tokens", "fine_prune", "rebudget"]

# surprisal and entropy of the first token come from the same row of logits: both are kept always
_FREE: tuple[ScoreName, ...] = ("first_token_surprisal", "first_token_entropy")


async def fine_prune(records: Sequence[Record], scorer: Scorer) -> list[Record]:
    """Each record with its `fine` block and token counts; records without text pass untouched."""
    counted = [count_tokens(record, scorer) for record in records]
    todo = [i for i, record in enumerate(counted) if record.coarse_steps]
    requests = deque(_request(counted[i], scorer) for i in todo)
    scored = await scorer.score(tuple(requests))
    for i, step_scores in zip(todo, scored, strict=True):
        record, request = counted[i], requests.popleft()  # its session ends with its record
        if _in_rounds(record.config):
            block = await _prune_iteratively(record, step_scores, scorer, request.session)
        else:
            block = _prune_once(record, step_scores, scorer.name, counter=scorer)
        counted[i] = count_tokens(record.with_fine(block), scorer)
    return counted


def rebudget(record: Record, config: PruneConfig) -> Record:
    """The record as a full run with `config` would give it, where `config` differs only in its
    target.

    Raises InvalidInput when the stored scores cannot answer: not scored, scored iteratively for a
    larger budget, or counted by a tokenizer whose counts do not add up.
    """
    if record.fine is None or record.tokens is None:
        return Record(
            triple=record.triple, config=config, coarse=record.coarse, tokens=record.tokens
        )
    scored, method = record.fine.scored, get_method(config.method)
    if method.needs_scores and config.score not in scored.scores and len(scored.tokens) > 1:
        how = f"score={config.score!r} or all_scores" if scored.scores else "score_within_budget"
        raise InvalidInput(
            f"record {record.id!r} holds no {config.score} scores; prune it again with {how}"
        )
    if "counts_not_additive" in record.flags:
        raise InvalidInput(
            f"record {record.id!r}: the counts of tokenizer {record.tokens.tokenizer!r} do not add "
            "up over steps, so a new budget needs that tokenizer; prune it again"
        )
    fresh = Record(triple=record.triple, config=config, coarse=record.coarse, tokens=record.tokens)
    if config.mode == "iterative" and method.needs_scores:
        block = _replay_iterative(fresh, record.fine)
    else:
        block = _prune_once(fresh, scored, record.fine.scorer, counter=None)
    pruned = fresh.with_fine(block)
    count = record.tokens.coarse
    if len(block.kept) < len(scored.tokens):
        count = _sum_tokens(scored, block.kept)
    return pruned.with_tokens(record.tokens.model_copy(update={"pruned": count}))


def count_tokens(record: Record, counter: TokenCounter) -> Record:
    """The record with real token counts of its CoT at each stage."""
    known: dict[str, int] = {}
    for text in (record.triple.cot, record.coarse_cot, record.pruned_cot):
        if text not in known:
            known[text] = counter.count(text)
    return record.with_tokens(
        TokenCounts(
            tokenizer=counter.tokenizer_name,
            original=known[record.triple.cot],
            coarse=known[record.coarse_cot],
            pruned=known[record.pruned_cot],
        )
    )


def _request(record: Record, scorer: Scorer) -> ScoreRequest:
    config = record.config
    wanted = get_method(config.method).needs_scores and len(record.coarse_steps) > 1
    if not config.score_within_budget and config.step_ratio is None and record.tokens is not None:
        wanted = wanted and record.tokens.coarse > _budget(record, bos=0)
    offered = getattr(scorer, "offers", _FREE)  # a scorer that knows less says so
    more: tuple[ScoreName, ...] = get_args(ScoreName) if config.all_scores else _FREE
    kept = (name for name in more if name in offered)
    names = tuple(dict.fromkeys((config.score, *kept))) if wanted else ()
    session = ScoreSession() if names and _in_rounds(config) else None
    return ScoreRequest(record.triple.question, record.coarse_steps, names, config.context, session)


def _in_rounds(config: PruneConfig) -> bool:
    return config.mode == "iterative" and get_method(config.method).needs_scores


def _budget(record: Record, bos: int) -> int:
    assert record.tokens is not None
    return token_budget(
        max_tokens=record.config.max_tokens,
        keep_ratio=record.config.keep_ratio,
        original_tokens=record.tokens.original,
        bos=bos if record.config.count_bos else 0,
    )


def _prune_once(
    record: Record, scored: StepScores, scorer: str, *, counter: TokenCounter | None
) -> FineBlock:
    """Algorithm 2: one vector of scores, all steps present."""
    assert record.tokens is not None
    config, size = record.config, len(scored.tokens)
    budget = None if config.step_ratio is not None else _budget(record, scored.bos)
    flags = list(scored.flags)
    if budget is not None and record.tokens.coarse <= budget:
        choice = Selection(tuple(range(size)), (), record.tokens.coarse, over_budget=False)
    else:
        importance = _importance(record, scored)
        if _lacks(importance):
            flags.append("score_missing")
        remove = _remover(config, importance, scored, _protected(config, size))
        choice = remove(
            max_tokens=budget, remove_steps=_removals(config, size), refill=config.refill
        )
        steps = record.coarse_steps
        if counter is not None and budget is not None and _miscounted(choice, steps, counter):
            flags.append("counts_not_additive")
            choice = _remove_by_real_counts(remove, steps, budget, counter, most=size)
        if choice.over_budget:
            flags.append("over_budget")
    return FineBlock(
        method=config.method,
        scorer=scorer,
        tokenizer=record.tokens.tokenizer,
        max_tokens=budget,
        kept=choice.kept,
        removed=choice.removed,
        scored=scored,
        flags=tuple(dict.fromkeys(flags)),
    )


def _importance(record: Record, scored: StepScores) -> Sequence[float | None]:
    rank = get_method(record.config.method).importance
    if rank is None:
        raise InvalidInput(f"method {record.config.method!r} does not rank steps")
    if len(scored.tokens) == 1:
        return (None,) if not scored.scores else rank(record, scored)
    return rank(record, scored)


def _lacks(importance: Sequence[float | None]) -> bool:
    """Whether a score is missing; a step alone needs none."""
    return len(importance) > 1 and any(score is None for score in importance)


def _protected(config: PruneConfig, size: int) -> frozenset[int]:
    first = range(min(config.protect_first, size))
    last = range(max(size - config.protect_last, 0), size)
    return frozenset((*first, *last))


def _removals(config: PruneConfig, size: int) -> int | None:
    """How many of `size` steps `step_ratio` removes; None where a number of tokens decides."""
    ratio = config.step_ratio
    return None if ratio is None else math.floor((1 - ratio) * size + 1e-9)


def _remover(
    config: PruneConfig,
    importance: Sequence[float | None],
    scored: StepScores,
    protected: frozenset[int],
) -> Callable[..., Selection]:
    """`remove_lowest` on these steps; how many go is for each call to say."""
    return partial(
        remove_lowest,
        importance,
        scored.tokens,
        scored.tokens_joined,
        min_steps=config.min_steps,
        protected=protected,
    )


def _miscounted(choice: Selection, steps: Sequence[str], counter: TokenCounter) -> bool:
    """Whether the kept steps have another number of tokens than their counts add up to."""
    return counter.count(join_steps([steps[i] for i in choice.kept])) != choice.tokens


def _remove_by_real_counts(
    remove: Callable[..., Selection],
    steps: Sequence[str],
    budget: int,
    counter: TokenCounter,
    *,
    most: int,
) -> Selection:
    """The order of `remove`, at most `most` steps, with one tokenisation per probe: counts fall
    monotonically, so O(log P) probes.
    """

    def after(removals: int) -> Selection:
        choice = remove(remove_steps=removals)
        tokens = counter.count(join_steps([steps[i] for i in choice.kept]))
        return Selection(choice.kept, choice.removed, tokens, over_budget=tokens > budget)

    low, high = 0, min(most, len(steps))
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if after(middle).over_budget else (low, middle)
    return after(low)


async def _prune_iteratively(
    record: Record, scored: StepScores, scorer: Scorer, session: ScoreSession | None
) -> FineBlock:
    """Re-score what is left after every `rescore_every` removals (ours; the scripts only advertise
    it). The session lets a round cost only the steps behind the first removed one.
    """
    assert record.tokens is not None
    config, size = record.config, len(scored.tokens)
    budget = None if config.step_ratio is not None else _budget(record, scored.bos)
    goal = _removals(config, size)
    if (budget is not None and record.tokens.coarse <= budget) or size == 1:
        return _prune_once(record, scored, scorer.name, counter=None)
    protected = _protected(config, size)
    left, current, flags = list(range(size)), scored, list(scored.flags)
    removed: list[int] = []
    while True:
        importance = _importance(record, current)
        if _lacks(importance):
            flags.append("score_missing")
        steps = [record.coarse_steps[i] for i in left]
        fixed = frozenset(at for at, step in enumerate(left) if step in protected)
        remove = _remover(config, importance, current, fixed)
        choice = remove(
            max_tokens=budget,
            remove_steps=None if goal is None else goal - len(removed),
            max_removals=config.rescore_every,
        )
        if budget is not None and _miscounted(choice, steps, scorer):
            flags.append("counts_not_additive")
            choice = _remove_by_real_counts(
                remove, steps, budget, scorer, most=config.rescore_every
            )
        removed += [left[at] for at in choice.removed]
        left = [left[at] for at in choice.kept]
        if not choice.over_budget or len(choice.removed) < config.rescore_every:
            break
        request = ScoreRequest(
            record.triple.question,
            tuple(record.coarse_steps[i] for i in left),
            (config.score,),
            config.context,
            session,
        )
        [current] = await scorer.score([request])
    if choice.over_budget:
        flags.append("over_budget")
    return FineBlock(
        method=config.method,
        scorer=scorer.name,
        tokenizer=record.tokens.tokenizer,
        max_tokens=budget,
        kept=tuple(left),
        removed=tuple(removed),
        scored=scored,
        scored_budget=choice.tokens,
        flags=tuple(dict.fromkeys(flags)),
    )


def _replay_iterative(record: Record, stored: FineBlock) -> FineBlock:
    """Cut the stored removal order at a larger budget; a smaller one was never scored."""
    assert record.tokens is not None
    scored, config = stored.scored, record.config
    if config.step_ratio is not None:
        raise InvalidInput("an iterative run can be re-budgeted by tokens only, not by step_ratio")
    budget = _budget(record, scored.bos)
    if record.tokens.coarse <= budget:
        return _prune_once(record, scored, stored.scorer, counter=None)
    if stored.scored_budget is None or budget < stored.scored_budget:
        raise InvalidInput(
            f"record {record.id!r} was scored iteratively down to {stored.scored_budget} tokens; "
            f"a budget of {budget} needs the scorer again"
        )
    order = {step: float(rank) for rank, step in enumerate(stored.removed)}
    choice = remove_lowest(
        [order.get(i) for i in range(len(scored.tokens))],
        scored.tokens,
        scored.tokens_joined,
        max_tokens=budget,
        min_steps=config.min_steps,
        protected=frozenset(stored.kept),
    )
    return stored.model_copy(
        update={
            "max_tokens": budget,
            "kept": choice.kept,
            "removed": choice.removed,
            "scored_budget": choice.tokens,
            "flags": tuple(f for f in stored.flags if f != "over_budget"),
        }
    )


def _sum_tokens(scored: StepScores, kept: Sequence[int]) -> int:
    if not kept:
        return 0
    return sum(scored.tokens_joined[i] for i in kept[:-1]) + scored.tokens[kept[-1]]
