"""What a run prints at its end, and what a dry run prints instead."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from asap.errors import AsapError
from asap.estimate import Summary, estimate
from asap.fine import fine_prune
from asap.types import Record
from asap_cli.input import Source
from asap_cli.ledger import Rejected
from asap_cli.options import PruneOptions

if TYPE_CHECKING:
    from asap.ports import Scorer, TokenCounter
    from asap_anchor.chat import OpenAIChat

SHOWN_REJECTIONS = 20
CALIBRATION_RECORDS = 3


def print_summary(
    console: Console,
    options: PruneOptions,
    summary: Summary,
    rejected: Sequence[Rejected],
    chat: OpenAIChat | None,
    seconds: float,
) -> None:
    """Kept ratio, steps, tokens, fallbacks, attempts, seconds, money; then every rejected line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    statuses = ", ".join(f"{count} {name}" for name, count in sorted(summary.statuses.items()))
    table.add_row("records", f"{summary.records} ({statuses})" if statuses else "0")
    table.add_row(
        "CoT tokens",
        f"{summary.tokens:,} → {summary.coarse_tokens:,} after stage 1 → {summary.pruned_tokens:,}",
    )
    table.add_row("kept ratio", f"{summary.kept_ratio:.1%}")
    table.add_row("steps", f"{summary.kept_steps:,} of {summary.steps:,} kept")
    if summary.attempts:
        table.add_row(
            "stage 1",
            f"{summary.attempts} attempts, {summary.first_attempt} records accepted at the first, "
            f"{summary.statuses.get('fallback_original', 0)} fell back",
        )
    if chat is not None:
        usage, stats = summary.usage, chat.stats
        cost = "unknown (give --llm-price)" if usage.cost_usd is None else f"${usage.cost_usd:.4f}"
        table.add_row(
            "LLM",
            f"{usage.prompt_tokens:,} tokens in, {usage.completion_tokens:,} out, cost {cost}; "
            f"{stats.calls} calls sent now, {stats.cached} from the cache, {stats.retries} retries",
        )
    if summary.flags:
        flags = ", ".join(f"{name} {count}" for name, count in sorted(summary.flags.items()))
        table.add_row("flags", flags)
    table.add_row("seconds", f"{seconds:.1f}")
    table.add_row("written to", str(options.out))
    console.print(table, highlight=False)
    for entry in sorted(rejected, key=lambda entry: entry.line)[:SHOWN_REJECTIONS]:
        console.print(
            f"line {entry.line}: {entry.detail}",
            style="red",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if rejected:
        console.print(
            f"{len(rejected)} lines rejected, listed in {options.out.name}.rejected.jsonl",
            style="red",
        )


def print_dry_run(
    console: Console,
    options: PruneOptions,
    source: Source,
    scorer: Scorer | None,
    counter: TokenCounter,
) -> int:
    """Estimate without a call to the LLM; the device time is measured on the first records."""
    records, bad = [], 0
    for _, triple in source.triples():
        if isinstance(triple, AsapError):
            bad += 1
        else:
            records.append(Record(triple=triple, config=options.config))
    planned = estimate(records, options.config, counter)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("records", f"{planned.records:,} ({bad} lines would be rejected)")
    table.add_row("CoT tokens", f"{planned.cot_tokens:,} ({counter.tokenizer_name})")
    if planned.llm_calls:
        tokens = f"{planned.prompt_tokens:,} tokens in, {planned.completion_tokens:,} out"
        table.add_row("LLM", f"about {planned.llm_calls:,} calls, {tokens}")
        cost = "unknown (give --llm-price)"
        if options.llm_price is not None:
            cost = f"about ${planned.cost_usd(*options.llm_price):.2f}"
        table.add_row("LLM cost", cost)
    if scorer is not None and planned.scored_tokens and records:
        rate = asyncio.run(_tokens_per_second(records, scorer))
        table.add_row(
            "device time",
            f"about {planned.scored_tokens / rate:,.0f} s for {planned.scored_tokens:,} scored "
            f"tokens at {rate:,.0f} tokens/s, measured now",
        )
    console.print(table, highlight=False)
    return 0


async def _tokens_per_second(records: Sequence[Record], scorer: Scorer) -> float:
    sample = list(islice(records, CALIBRATION_RECORDS))
    await fine_prune(sample[:1], scorer)  # warm-up
    started = time.monotonic()
    done = await fine_prune(sample, scorer)
    tokens = sum(record.tokens.coarse for record in done if record.tokens is not None)
    return max(tokens, 1) / max(time.monotonic() - started, 1e-6)
