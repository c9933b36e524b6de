from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from asap.runs import TrainProgress, TrainResult
from asap_cli.train_views import (
    TrainProgressView,
    preflight_table,
    preview_texts,
    result_table,
    statistics_table,
)
from asap_trainer.preview import Piece, Spread, TokenStatistics

RESULT = TrainResult(
    model_sha256="0" * 64,
    steps=40,
    samples=30,
    held_out=3,
    dropped={"too-long": 2},
    tokens_per_sample=800.4,
    response_tokens_per_sample=700.0,
    tokens_per_step=3200.0,
    step_seconds=0.5,
    seconds=20.0,
    loss_first=2.5,
    loss_last=1.25,
    held_out_loss_before=2.75,
    held_out_loss_after=1.5,
    data_sha256="1" * 64,
    template="deepseek-r1",
    base="demo",
    device="a \x1b[31mCPU",
    versions={},
)


def said(*things, terminal=False):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=200)
    for thing in things:
        console.print(thing)
    return stream.getvalue()


def test_the_preview_says_where_the_loss_begins_also_without_colours():
    pieces = [Piece("a question\x1b[2J", False), Piece("an answer", True)]
    text = said(*preview_texts(["one", "two"], [pieces]))
    assert text.index("one") < text.index("a question") < text.index("loss from here on")
    assert text.index("loss from here on") < text.index("an answer")
    assert "\x1b" not in text
    assert "two" not in text, "no sample of it was given"


def test_statistics_of_all_samples():
    figures = TokenStatistics(
        count=1000,
        held_out=10,
        sample=Spread(1234.5, 1200, 2000, 4000),
        response=Spread(1000.4, 990, 1500, 3000),
        dropped={"too-long": 7},
    )
    text = said(statistics_table(figures, "deepseek-r1"))
    sample = next(line for line in text.splitlines() if line.strip().startswith("sample"))
    assert sample.split() == ["sample", "1,234", "1,200", "2,000", "4,000"]
    caption = "1,000 samples, 10 held out, template deepseek-r1; 7 dropped: too-long"
    assert caption in " ".join(text.split())


def test_a_preflight_shows_what_was_asked_for_first_and_what_is_not_known_as_a_dash():
    known = {"fits": True, "peak_memory_bytes": 12.5e9, "step_seconds": 1.5, "steps": 400,
             "dropped": 3, "hours": 0.167, "usd": 0.5}  # fmt: skip
    unknown = dict.fromkeys(known) | {"fits": False}
    answer = {
        "asked": unknown,
        "suggestions": [{**known, "change": {"batch_size": 1}}],
        "device": "H200",
    }
    lines = said(preflight_table(json.dumps(answer))).splitlines()
    assert lines[1].split() == ["as", "asked", "no", *["-"] * 6]
    assert lines[2].split() == [
        "batch_size=1",
        "yes",
        "12.50",
        "1.500",
        "400",
        "3",
        "0.167",
        "0.50",
    ]
    assert "measured on H200" in lines[3]


def test_a_result_tells_losses_drops_and_the_machine():
    text = said(result_table(RESULT))
    for words in ("40 in 20 s (0.500 s each)", "30; dropped: 2 too-long", "2.5000 → 1.2500",
                  "3 samples, loss 2.7500 → 1.5000"):  # fmt: skip
        assert words in text
    assert "\x1b" not in text
    without = RESULT.model_copy(
        update={"held_out_loss_before": None, "peak_memory_bytes": 3 * 10**9}
    )
    text = said(result_table(without))
    assert "held out" not in text
    assert "3.00 GB at most" in text


STATES = [
    TrainProgress(),
    TrainProgress(phase="training", step=1, total_steps=40, loss=2.5, learning_rate=1e-3),
    TrainProgress(phase="training", step=2, total_steps=40, loss=2.25, eta_s=19.4),
    TrainProgress(phase="done", step=40, total_steps=40),
]


@pytest.mark.parametrize(("every_s", "lines"), [(3600.0, 3), (0.0, 4)])
def test_plain_lines_come_at_changes_of_phase_and_from_time_to_time(every_s, lines):
    stream = io.StringIO()
    with TrainProgressView(Console(file=stream, width=200), line_every_s=every_s) as view:
        for state in STATES:
            view.show(state)
    said = stream.getvalue().splitlines()
    assert len(said) == lines
    assert said[0] == "starting"
    assert said[1] == "training 1/40, loss 2.5000, lr 1.00e-03"
    assert said[-1] == "done 40/40"
    if lines == 4:
        assert said[2] == "training 2/40, loss 2.2500, 19 s left"


def test_a_bar_on_a_terminal():
    stream = io.StringIO()
    with TrainProgressView(Console(file=stream, force_terminal=True, width=200)) as view:
        for state in STATES:
            view.show(state.model_copy(update={"tokens_per_s": 1234.0}))
    text = stream.getvalue()
    for words in ("done", "40/40", "1,234 tokens/s"):
        assert words in text
