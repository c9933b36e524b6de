"""`asap prune`: read lines, run both stages, journal each record, write OUT, sum up."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console

from asap.errors import AsapError, InvalidInput
from asap.estimate import Summary
from asap.methods import get_method
from asap.types import Record
from asap_cli.engines import open_chat, open_counter, open_scorer
from asap_cli.input import Source
from asap_cli.journal import Journal, content_key
from asap_cli.ledger import Rejected, write_ledger
from asap_cli.options import PruneOptions
from asap_cli.progress import PruneProgress
from asap_cli.report import print_dry_run, print_summary
from asap_runtime.datasets import count_lines
from asap_runtime.layouts import RecordWriter
from asap_runtime.pipeline import prune_stream
from asap_runtime.problems import INTERRUPTED, PROBLEMS

if TYPE_CHECKING:
    from asap.ports import Scorer, TokenCounter
    from asap_anchor.chat import OpenAIChat


@dataclass(slots=True)
class PruneRun:
    """One run: what goes in, in which order, what came of it."""

    options: PruneOptions
    source: Source
    journal: Journal
    engines: str
    order: list[tuple[int, str]] = field(default_factory=list)
    """(line number, key) of every good line, in input order."""
    rejected: list[Rejected] = field(default_factory=list)
    _waiting: list[tuple[int, str]] = field(default_factory=list)

    def feed(self) -> Iterator[Record]:
        """Records that are still to do; bad lines go to the ledger, finished ones are skipped."""
        queued: set[str] = set()
        for number, triple in self.source.triples():
            if isinstance(triple, AsapError):
                self.rejected.append(Rejected.of(number, triple))
                continue
            record = Record(triple=triple, config=self.options.config)
            key = content_key(record, self.engines)
            self.order.append((number, key))
            if key not in self.journal and key not in queued:
                queued.add(key)
                self._waiting.append((number, key))
                yield record

    async def run(
        self,
        chat: OpenAIChat | None,
        scorer: Scorer | None,
        counter: TokenCounter,
        progress: PruneProgress,
    ) -> None:
        """Prune everything that `feed` gives, journalling each record as it comes."""
        concurrency = self.options.llm_concurrency
        stream = prune_stream(
            self.feed(), chat=chat, scorer=scorer, counter=counter, concurrency=concurrency
        )
        async for outcome in stream:
            number, key = self._waiting[outcome.position]
            if outcome.error is None and outcome.record is not None:
                self.journal.append(key, outcome.record)
                progress.add(outcome.record)
            elif outcome.error is not None:
                triple = outcome.record.triple if outcome.record else None
                self.rejected.append(Rejected.of(number, outcome.error, triple))
            progress.show(len(self.journal) + len(self.rejected))

    def write(self) -> Summary:
        """OUT in input order from the journal, and the ledger beside it."""
        summary = Summary()
        with RecordWriter(self.options.out, self.options.layout) as writer:
            for _, key in self.order:
                if key in self.journal:
                    record = self.journal[key]
                    writer.write(record)
                    summary.add(record)
        write_ledger(self.options.out, self.rejected)
        return summary


def run_prune(options: PruneOptions, *, dry_run: bool) -> int:
    """The command; returns its exit code."""
    console = Console(stderr=True)
    started = time.monotonic()
    RecordWriter.check(options.out)
    source = Source.open(options.source, options.schema)
    source.introduce(console, ask=options.ask)
    chat = open_chat(options)
    scorer = open_scorer(options)
    counter = scorer or open_counter(options)
    if dry_run:
        return print_dry_run(console, options, source, scorer, counter)
    engines = describe_engines(options, chat, scorer)
    console.print(f"[dim]{engines}[/]", highlight=False)
    journal = Journal(Journal.path_for(options.out))
    if journal.resumed:
        console.print(f"resuming: {journal.resumed} records are done already")
    run = PruneRun(options, source, journal, engines)
    stopped: AsapError | None = None
    interrupted = False
    with PruneProgress(console, count_lines(options.source), journal.resumed) as progress:
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            asyncio.run(_run_and_close(run, chat, scorer, counter, progress))
        except KeyboardInterrupt:
            interrupted = True
        except AsapError as error:
            stopped = error
        finally:
            signal.signal(signal.SIGTERM, previous)
    summary = run.write()
    complete = stopped is None and not interrupted
    journal.close(delete=complete)
    print_summary(console, options, summary, run.rejected, chat, time.monotonic() - started)
    if stopped is not None:
        raise stopped
    if interrupted:
        console.print(
            f"interrupted: {summary.records} records are in {options.out}; "
            "the same command goes on from here"
        )
        return INTERRUPTED
    return PROBLEMS[InvalidInput].exit_code if run.rejected else 0


async def _run_and_close(
    run: PruneRun,
    chat: OpenAIChat | None,
    scorer: Scorer | None,
    counter: TokenCounter,
    progress: PruneProgress,
) -> None:
    try:
        await run.run(chat, scorer, counter, progress)
    finally:
        if chat is not None:
            await chat.close()


def describe_engines(options: PruneOptions, chat: OpenAIChat | None, scorer: Scorer | None) -> str:
    """One line that names the method and both engines; part of each record's content key."""
    stages = get_method(options.config.method).stages
    parts = [f"method {options.config.method}"]
    if "anchor" in stages:
        if chat is not None:
            parts.append(f"anchor {chat.name} ({options.config.protocol})")
        else:
            parts.append("anchor extractive (not from the paper)")
    if scorer is not None:
        parts.append(f"scorer {scorer.name}")
    return ", ".join(parts)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
