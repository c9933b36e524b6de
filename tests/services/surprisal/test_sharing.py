"""CoTs of one question share its pass where that saves enough, and score as they do alone."""

from __future__ import annotations

import pytest

from asap.ports import ScoreRequest, ScoreSession
from asap_surprisal.forward import PassRow
from asap_surprisal.sequence import Row
from asap_surprisal.sharing import share_beginnings
from scoring import ALL_SCORES, FIRST, QUESTION, STEPS, load, request_of

LONG = QUESTION * 40
START = list(range(1000, 1600))


def row(*ids, first):
    return PassRow(Row(list(ids), [first, len(ids) - 1], [0, 0], [first + 1, len(ids)]))


def test_rows_go_on_behind_what_they_have_in_common():
    rows = [
        row(*START, 4, 5, first=600),
        row(9, 9, first=0),
        row(*START, 7, 8, 6, first=600),
    ]
    [begin], rest = share_beginnings(rows, ["q", "other", "q"], most=600)
    assert begin.row.ids == START
    assert begin.row.positions == []
    assert [one.row for one in rest] == [one.row for one in rows]
    assert [one.reused for one in rest] == [600, 0, 600]
    assert rest[0].known is rest[2].known is begin.grown is not None
    assert rest[1].known is None


def test_the_first_scored_position_runs_in_each_row():
    """Its hidden state is read, however far the rows agree."""
    rows = [row(*START, first=599), row(*START, first=597)]
    [begin], _ = share_beginnings(rows, ["q", "q"], most=600)
    assert begin.row.ids == START[:597]


@pytest.mark.parametrize(
    ("rows", "questions"),
    [
        ([row(*START, 1, first=600)], ["q"]),
        ([row(*START, 1, first=600)] * 2, ["q", "other"]),
        ([row(*START, 1, first=600)] * 2, [None, None]),
        ([row(*START, 1, first=600), row(5, *START, first=600)], ["q", "q"]),  # cut in front
        ([row(*START, 1, first=500)] * 2, ["q", "q"]),  # 500 tokens
        ([row(*START, *range(9000), first=600)] * 2, ["q", "q"]),  # 600 of 19,200
        ([row(*START, first=599), PassRow(Row(START, [], [], []))], ["q", "q"]),
    ],
)
def test_what_does_not_pay_is_left_alone(rows, questions):
    assert share_beginnings(rows, questions, most=10**6) == ([], rows)


def test_as_many_beginnings_are_kept_as_there_is_room_for():
    rows = [row(*START, n, first=600) for n in range(6)]
    first, rest = share_beginnings(rows, ["a", "b", "c"] * 2, most=1200)
    assert len(first) == 2
    assert [one.reused for one in rest] == [600, 600, 0] * 2


@pytest.mark.parametrize("context", ["raw", "chat"])
def test_scores_are_those_of_each_alone(tiny_model_dir, context):
    requests = [
        request_of(*(STEPS * 30)[at : at + 5 * at + 2], question=question, context=context)
        for question in (LONG, QUESTION)
        for at in range(5)
    ]
    scorer, lone = load(tiny_model_dir), load(tiny_model_dir)
    together = scorer.score_batch(requests)
    for request, found in zip(requests, together, strict=True):
        [alone] = lone.score_batch([request])
        assert found.flags == alone.flags
        for name in ALL_SCORES:
            assert found.scores[name] == pytest.approx(alone.scores[name], abs=1e-5), name
    question = scorer.count(LONG)
    assert lone.totals.tokens_reused == 0
    assert scorer.totals.tokens_reused >= 5 * question
    assert lone.totals.tokens - scorer.totals.tokens >= 4 * question
    assert scorer.totals.operations < lone.totals.operations


def test_batches_of_one_question_may_be_several(tiny_model_dir):
    requests = [request_of(*(STEPS * 9)[at:], question=LONG, scores=FIRST) for at in range(6)]
    small, large = load(tiny_model_dir, max_batch_tokens=300), load(tiny_model_dir)
    for few, many in zip(small.score_batch(requests), large.score_batch(requests), strict=True):
        assert few.scores[FIRST[0]] == pytest.approx(many.scores[FIRST[0]], abs=1e-5)
    assert small.totals.passes > large.totals.passes == 2
    assert small.totals.tokens == large.totals.tokens


def test_rounds_have_keys_and_values_of_their_own(tiny_model_dir):
    scorer = load(tiny_model_dir)
    requests = [ScoreRequest(LONG, STEPS, FIRST, session=ScoreSession()) for _ in range(3)]
    scorer.score_batch(requests)
    assert scorer.totals.tokens_reused == 0
