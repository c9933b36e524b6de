"""`asap rebudget`: another budget for finished records, from their stored scores."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from asap.config import PruneConfig
from asap.errors import InvalidInput
from asap.estimate import Summary
from asap.fine import rebudget
from asap_cli.options import validate_config
from asap_runtime.datasets import read_records
from asap_runtime.layouts import Layout, RecordWriter


def run_rebudget(
    source: str,
    out: Path,
    max_tokens: int | None,
    keep_ratio: float | None,
    layout: Layout,
) -> int:
    """Write the records of `source` at the new target to `out`; returns the exit code."""
    if (max_tokens is None) == (keep_ratio is None):
        raise InvalidInput("give exactly one of --max-tokens and --keep-ratio")
    target = {"max_tokens": max_tokens, "keep_ratio": keep_ratio, "step_ratio": None}
    RecordWriter.check(out)
    if Path(source).resolve() == out.resolve():
        raise InvalidInput("OUT and the new file must differ")
    summary = Summary()
    with RecordWriter(out, layout) as writer:
        for record in read_records(source):
            config = validate_config(PruneConfig, {**record.config.model_dump(), **target})
            pruned = rebudget(record, config)
            writer.write(pruned)
            summary.add(pruned)
    Console(stderr=True).print(
        f"{summary.records} records, {summary.tokens:,} → {summary.pruned_tokens:,} tokens "
        f"(kept ratio {summary.kept_ratio:.1%}), written to {out}",
        highlight=False,
    )
    return 0
