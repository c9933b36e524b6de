"""Takes stored files in, in the background: lines to items, until a job is whole or rejected.

The request that brought the file has been answered long before. Each gateway process runs this;
what one of them leaves, another one goes on with.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Self, cast

from asap.config import PruneConfig
from asap.errors import AsapError, InvalidInput
from asap.methods import get_method
from asap.types import Record, Triple
from asap_runtime.benchmarks import BenchmarkFolder
from asap_runtime.blobs import BlobStore
from asap_runtime.database import Database
from asap_runtime.evaluations import evaluation_items
from asap_runtime.exports import run_item
from asap_runtime.intake import (
    LEASE_S,
    Source,
    StoredEvaluation,
    StoredLines,
    StoredRun,
    StoredScores,
    in_batches,
)
from asap_runtime.json_lines import Line, ReadLimits, read_json_lines
from asap_runtime.ledger import JobLedger
from asap_runtime.logs import get_logger
from asap_runtime.parquet_rows import read_parquet
from asap_runtime.problems import item_problem
from asap_runtime.rebudgeting import rebudgeted_items
from asap_runtime.run_removal import JobRemoval
from asap_runtime.schemas import Schema, detect_schema, read_triples
from asap_runtime.takings import Taking, Takings
from asap_runtime.values import NewItem

__all__ = [
    "Ingester",
    "IntakeLimits",
    "detect",
    "new_item",
    "stored_lines",
    "stored_triples",
]

PEEK = 32
"""Lines looked at to know the schema, before the job is accepted."""
SHARE_COUNTS_FROM = 20
"""Lines seen before the share of bad ones can end the reading; at the end it always counts."""
POLL_S = 1.0
WORKERS = 2
"""Files at a time, so that a long one does not hold up a short one."""
LONGEST_CUSTOM_ID = 512
ORPHAN_S = 24 * 3600.0
TIDY_S = 3600.0


STRANGERS = ReadLimits(expanded_ratio=20, expanded_bytes=4 * 2**30)


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """What a stored file may hold; beyond it the job is rejected."""

    read: ReadLimits = STRANGERS
    max_items: int = 1_000_000
    max_bad_lines: int = 10_000
    max_bad_share: float = 0.1


def detect(blobs: BlobStore, key: str, ending: str, limits: IntakeLimits) -> Schema:
    """The schema of a stored file's first lines. Raises InvalidInput when there is none, or when
    the file cannot be read.
    """
    with closing(stored_lines(blobs, key, ending, limits.read, after=0)) as lines:
        head = islice(_readable(lines), PEEK)
        schema = detect_schema(line.row for line in head if line.row is not None)
    if schema is None:
        raise InvalidInput(f"none of the first {PEEK} lines has a known schema")
    return schema


def stored_triples(
    blobs: BlobStore, source: StoredLines, limits: IntakeLimits, *, after: int = 0
) -> Generator[tuple[int, Triple | AsapError], None, None]:
    """The triples of a stored file with their line numbers, from behind line `after`; an error in
    the place of a bad line. Raises InvalidInput where the file cannot be read on.
    """
    with closing(stored_lines(blobs, source.key, source.ending, limits.read, after=after)) as lines:
        yield from read_triples(_readable(lines), cast(Schema, source.schema))


def stored_lines(
    blobs: BlobStore, key: str, ending: str, limits: ReadLimits, *, after: int = 0
) -> Generator[Line, None, None]:
    """The lines of a stored file, from behind line `after`, errors among them."""
    if ending == ".parquet":
        with blobs.local(key) as path:
            yield from read_parquet(path, limits, after=after)
    else:
        stream = blobs.open(key)
        yield from read_json_lines(stream, limits, compressed=ending.endswith(".gz"), after=after)


def new_item(line: int, triple: Triple | AsapError, config: PruneConfig) -> NewItem:
    """The item of one input line."""
    if isinstance(triple, AsapError):
        return NewItem(line, None, None, problem=item_problem(triple))
    stages = get_method(config.method).stages
    record = Record(triple=triple, config=config)
    custom_id = _custom_id(triple)
    if not stages:
        return NewItem(line, None, record.model_dump_json().encode(), custom_id)
    # What follows from the rest is left out: half the bytes, a sixth of the time.
    derived = set(Record.model_computed_fields)
    payload = record.model_dump_json(exclude=derived).encode()
    return NewItem(line, stages[0], payload, custom_id)


def _custom_id(triple: Triple) -> str | None:
    """The caller's own name of a line, unique in its file; from its field of that name."""
    given = triple.meta.get("custom_id")
    return given if isinstance(given, str) and len(given) <= LONGEST_CUSTOM_ID else None


class _Stopped(Exception):
    pass


class Ingester:
    """Takes in what waits, in threads, while its block runs.

    Args:
        on_taken_in: called with the id of a job that has become whole.
        benchmarks: what evaluations may name.
    """

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        limits: IntakeLimits,
        on_taken_in: Callable[[str], None],
        *,
        benchmarks: BenchmarkFolder | None = None,
        lease_s: float = LEASE_S,
        poll_s: float = POLL_S,
    ) -> None:
        self._takings, self._ledger = Takings(database, lease_s=lease_s), JobLedger(database)
        self._removal = JobRemoval(database, blobs)
        self._blobs, self._limits, self._on_taken_in = blobs, limits, on_taken_in
        self._benchmarks = benchmarks or BenchmarkFolder()
        self._poll_s, self._beat_s, self._tidy_at = poll_s, lease_s / 4, 0.0
        self._bell, self._stopping = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._log = get_logger()

    def __enter__(self) -> Self:
        self._stopping.clear()
        self._threads = [
            threading.Thread(target=self._live, name=f"ingester-{n}", daemon=True)
            for n in range(WORKERS)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop after the batch at hand and give leases back."""
        self._stopping.set()
        self._bell.set()
        for thread in self._threads:
            thread.join()

    def wake(self) -> None:
        """There is a new job: look now. From any thread, never waits."""
        self._bell.set()

    def take_in(self) -> bool:
        """Take one job in, to its end if nothing stops it. False: none waits."""
        taking = self._takings.take()
        if taking is None:
            return False
        log = self._log.bind(job_id=taking.job_id)
        try:
            self._fill(taking)
        except _Stopped:
            self._takings.release(taking)
        except AsapError as error:
            if error.problem_code == "job-finished":  # stopped, deleted, or in other hands
                log.info("intake.ended")
            elif error.retryable:  # again when the lease has ended
                log.warning("intake.failed", code=error.problem_code)
            else:
                self._reject(taking, error)
        except Exception:
            log.exception("intake.crashed")
            self._reject(taking, AsapError("an error of ours; the log has it"))
        return True

    def delete_orphans(self) -> int:
        """Delete uploads older than a day that no job waits for; how many."""
        needed, deleted = self._takings.needed(), 0
        for blob in self._blobs.uploads():
            if blob.age_s > ORPHAN_S and blob.key not in needed:
                self._blobs.delete(blob.key)
                deleted += 1
        return deleted

    def _live(self) -> None:
        while not self._stopping.is_set():
            busy = False
            try:
                busy = self.take_in()
                if not busy:
                    self._tidy()
            except Exception:
                self._log.exception("intake.failed")
            if not busy:
                self._bell.wait(self._poll_s)
                self._bell.clear()

    def _tidy(self) -> None:
        if time.monotonic() >= self._tidy_at:
            self._tidy_at = time.monotonic() + TIDY_S
            self.delete_orphans()
            self._removal.repeat()

    def _fill(self, taking: Taking) -> None:
        if isinstance(taking.source, StoredRun):
            self._add_run(taking, taking.source)
        elif isinstance(taking.source, StoredEvaluation):
            first = self._ledger.first_payload(taking.tenant, taking.job_id)
            keep, folder = self._keeper(taking), self._benchmarks
            new = evaluation_items(folder, self._blobs, taking, taking.source, first, keep)
            self._add(taking, new, self._limits)
        elif isinstance(taking.source, StoredScores):
            job_id, start = taking.source.scores_from, taking.items
            config = PruneConfig.model_validate(taking.config)
            again = rebudgeted_items(self._ledger, taking.tenant, job_id, config, start=start)
            self._add(taking, again, None)
        else:
            config = PruneConfig.model_validate(taking.config)
            lines = stored_triples(self._blobs, taking.source, self._limits, after=taking.line)
            with closing(lines):
                new = (new_item(number, triple, config) for number, triple in lines)
                self._add(taking, new, self._limits)
        if not self._takings.finish(taking):
            return
        self._on_taken_in(taking.job_id)
        self._log.info(
            "intake.finished", job_id=taking.job_id, items=taking.items, bad_lines=taking.bad
        )
        self._forget(taking.source)

    def _add_run(self, taking: Taking, source: StoredRun) -> None:
        if taking.items:  # all that a run has
            return
        ledger, blobs, keep = self._ledger, self._blobs, self._keeper(taking)
        tenant, job_id, config = taking.tenant, taking.job_id, taking.config
        item = run_item(ledger, blobs, tenant, job_id, config, source, keep)
        self._takings.add(taking, [item])

    def _keeper(self, taking: Taking) -> Callable[[], None]:
        """To be called while nothing is added: keeps the lease, and raises where the work ends."""
        due = time.monotonic() + self._beat_s

        def keep() -> None:
            nonlocal due
            if self._stopping.is_set():
                raise _Stopped
            if time.monotonic() >= due:
                self._takings.keep(taking)
                due = time.monotonic() + self._beat_s

        return keep

    def _add(self, taking: Taking, new: Iterable[NewItem], limits: IntakeLimits | None) -> None:
        for batch in in_batches(new):
            self._takings.add(taking, batch)
            if limits is not None:
                _check(taking, limits, SHARE_COUNTS_FROM)
            if self._stopping.is_set():
                raise _Stopped
        if limits is not None:
            _check(taking, limits, 0)

    def _reject(self, taking: Taking, reason: AsapError) -> None:
        if self._takings.reject(taking, item_problem(reason)):
            self._log.info("intake.rejected", job_id=taking.job_id, code=reason.problem_code)
            self._forget(taking.source)

    def _forget(self, source: Source) -> None:
        if isinstance(source, StoredLines) and source.owned:
            self._blobs.delete(source.key)


def _check(taking: Taking, limits: IntakeLimits, share_from: int) -> None:
    if taking.items > limits.max_items:
        raise InvalidInput(
            f"the file holds more than {limits.max_items:,} lines", code="too-many-items"
        )
    many = taking.bad > limits.max_bad_share * taking.items and taking.items >= share_from
    if many or taking.bad > limits.max_bad_lines:
        raise InvalidInput(
            f"{taking.bad:,} of the first {taking.items:,} lines cannot be used; at most "
            f"{limits.max_bad_share:.0%} and {limits.max_bad_lines:,} may be"
        )


def _readable(lines: Iterable[Line]) -> Iterator[Line]:
    """The lines, as long as they can be read. Raises the error of a fatal one."""
    for line in lines:
        if line.fatal:
            assert line.error is not None
            detail = f"line {line.number}: {line.error.detail}"
            raise InvalidInput(detail, code=line.error.problem_code, line=line.number)
        yield line
