from __future__ import annotations

import pytest

from asap.config import PruneConfig
from asap.types import Attempt, CoarseBlock, MatchReport, Record, Triple, Usage
from fakes import rows


@pytest.fixture
def out(asap, samples, tiny_model_dir, tmp_path):
    path = tmp_path / "out.jsonl"
    options = ("--anchor", "extractive", "--scorer", tiny_model_dir, "--device", "cpu", "--yes")
    assert asap("prune", samples, "-o", path, *options, "--max-tokens", 60).code == 0
    return path


def test_shows_every_step_with_its_stage_and_surprisal(asap, out):
    record = rows(out)[1]
    shown = asap("show", out, "--id", record["id"]).out
    assert record["id"] in shown
    lines = [line for line in shown.splitlines() if line.strip()]
    stages = [line.split()[1] for line in lines if line.split()[0].isdigit()]
    assert "kept" in stages
    anchor = shown.count("− anchor")
    surprisal = shown.count("− surprisal")
    kept = len(record["kept_steps"])
    total = len(record["fine"]["scored"]["tokens"]) + anchor
    assert kept + surprisal + anchor == total
    score = record["fine"]["scored"]["scores"]["first_token_surprisal"][0]
    assert f"{score:.2f}" in shown


def test_shows_what_became_of_every_reply_of_stage_1(asap, tmp_path):
    failed = MatchReport(match="paper", valid=False, reason="step 2 of 7 matches no \x1b[31m step")
    share = MatchReport(match="align", valid=False, reason="the reply stops", fidelity=0.91)
    good = MatchReport(match="paper", valid=True, kept=(0,), similarity=0.7512, containment=1.0)
    usage = Usage(calls=1, prompt_tokens=1234, completion_tokens=56)
    replies = [
        ("direct", 1, "accepted", None),
        ("coarse", 1, "truncated", None),
        ("coarse", 2, "invalid", failed),
        ("coarse", 3, "invalid", share),
        ("coarse", 4, "accepted", good),
    ]
    attempts = tuple(
        Attempt(purpose=p, number=n, outcome=o, report=r, reply_chars=4321, usage=usage)
        for p, n, o, r in replies
    )
    triple = Triple(id="it", question="q", cot="one\n\ntwo", answer="x")
    record = Record(triple=triple, config=PruneConfig(method="asap_stage1")).with_coarse(
        CoarseBlock(protocol="rewrite", model="m", kept=(0,), status="accepted", attempts=attempts)
    )
    path = tmp_path / "out.jsonl"
    path.write_text(record.model_dump_json() + "\n")

    shown = asap("show", path).out

    assert "\x1b" not in shown
    sizes = ["4,321", "1,234", "56"]
    lines = [line.split() for line in shown.splitlines() if line.split()[-3:] == sizes]
    assert [line[:-3] for line in lines] == [
        ["direct", "1", "accepted"],
        ["coarse", "1", "truncated"],
        ["coarse", "2", "invalid", *["step", "2", "of", "7", "matches", "no"], "␛[31m", "step"],
        ["coarse", "3", "invalid", "the", "reply", "stops", "0.910"],
        ["coarse", "4", "accepted", "0.751"],
    ]
    assert shown.index("coarse 4") < shown.index("nats"), "above the trace"


def test_without_an_llm_there_is_no_table_of_replies(asap, out):
    assert "reply" not in asap("show", out).out.split("nats")[0]


def test_the_first_record_without_an_id_and_none_with_a_wrong_one(asap, out):
    assert rows(out)[0]["id"] in asap("show", out).out
    assert "marco-o1-09" in asap("show", out, "--id", "marco-o1-09").out
    ran = asap("show", out, "--id", "nobody")
    assert (ran.code, ran.err) == (66, f"asap: no record in {str(out)!r} has the id 'nobody'\n")


def test_text_of_a_trace_is_never_read_as_markup(asap, out, tmp_path):
    text = out.read_text().splitlines()[0].replace("the ", "[red]the ")
    odd = tmp_path / "odd.jsonl"
    odd.write_text(text + "\n")
    assert "[red]" in asap("show", odd).out


def test_the_table_of_methods(asap):
    table = asap("methods").out
    for name in ("asap_stage1", "truncate", "anchor → surprisal"):
        assert name in table


def test_help_of_every_command(asap):
    for command in ((), ("prune",), ("rebudget",), ("show",), ("methods",)):
        assert asap(*command, "--help").code == 0
