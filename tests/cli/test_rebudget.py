from __future__ import annotations

import pytest

from fakes import rows


@pytest.fixture
def pruned(asap, samples, tiny_model_dir, tmp_path):
    def run(name, *target):
        out = tmp_path / name
        options = ("--anchor", "extractive", "--scorer", tiny_model_dir, "--device", "cpu", "--yes")
        assert asap("prune", samples, "-o", out, *options, *target).code == 0
        return out

    return run


@pytest.mark.parametrize(
    "target", [("--max-tokens", 60), ("--max-tokens", 4096), ("--keep-ratio", 0.25)]
)
def test_equals_a_full_run_at_that_budget(asap, pruned, tmp_path, target):
    start = pruned("start.jsonl", "--max-tokens", 300)
    full = pruned("full.jsonl", *target)
    out = tmp_path / "again.jsonl"
    ran = asap("rebudget", start, "-o", out, *target)
    assert ran.code == 0
    assert "kept ratio" in ran.err
    assert out.read_bytes() == full.read_bytes()


def test_parquet_and_other_layouts(asap, pruned, tmp_path):
    start = pruned("start.parquet", "--max-tokens", 300)
    out = tmp_path / "chat.jsonl"
    assert asap("rebudget", start, "-o", out, "--max-tokens", 50, "--layout", "messages").code == 0
    assert len(rows(out)) == 6


def test_what_cannot_work(asap, pruned, samples, tmp_path):
    start = pruned("start.jsonl")
    out = tmp_path / "o.jsonl"
    assert asap("rebudget", start, "-o", out).code == 65
    assert "exactly one" in asap("rebudget", start, "-o", out).err
    assert "must differ" in asap("rebudget", start, "-o", start, "--max-tokens", 5).err
    ran = asap("rebudget", samples, "-o", out, "--max-tokens", 5)
    assert ran.code == 65
    assert "line 1 of" in ran.err
    assert not out.exists()
