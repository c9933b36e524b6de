from __future__ import annotations

import pytest

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
