"""How a run stands, told to whoever follows it: progress.json and metrics.jsonl.

Written by a thread of their own, so that training never waits for the blob store; what it cannot
write in time is overtaken by what comes later.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any

from asap.errors import AsapError
from asap.runs import TrainProgress
from asap_runtime.logs import get_logger
from asap_runtime.run_files import RunFiles

__all__ = ["PERIOD_S", "Reporter"]

PERIOD_S = 3.0
"""Between two writings, at least."""
PROGRESS, METRICS = "progress.json", "metrics.jsonl"


class Reporter:
    """Holds the latest figures and writes them now and then; as a context manager it starts its
    thread and writes the last ones at its end.

    Args:
        files: of the run; None: nothing is written, as in all processes but the first.
        period_s: between two writings.
    """

    def __init__(self, files: RunFiles | None, *, period_s: float = PERIOD_S) -> None:
        self._files, self._period_s = files, period_s
        self._log = get_logger()
        self._lock = threading.Lock()
        self._progress = TrainProgress()
        self._rows: list[dict[str, Any]] = []
        self._written: dict[str, bytes] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def __enter__(self) -> Reporter:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()
        self._write()

    @property
    def progress(self) -> TrainProgress:
        """The latest figures."""
        return self._progress

    @property
    def rows(self) -> Sequence[dict[str, Any]]:
        """All lines of figures so far, those of a resumed run's earlier processes first."""
        with self._lock:
            return list(self._rows)

    def update(self, **fields: Any) -> None:
        """Change some of the figures."""
        with self._lock:
            values = {**self._progress.model_dump(), **fields, "written_at": time.time()}
            self._progress = TrainProgress.model_validate(values)

    def add_row(self, row: dict[str, Any]) -> None:
        """Add one line of figures."""
        with self._lock:
            self._rows.append(row)

    def restore(self, rows: Sequence[dict[str, Any]]) -> None:
        """Begin with the lines that a checkpoint holds: later ones are made again."""
        with self._lock:
            self._rows = list(rows)

    def _run(self) -> None:
        while not self._over.wait(self._period_s):
            self._write()

    def _write(self) -> None:
        if self._files is None:
            return
        with self._lock:
            # The clock goes on while nothing else does: a run that is alive is to be seen alive.
            progress = self._progress.model_copy(update={"written_at": time.time()})
            lines = "".join(f"{json.dumps(row)}\n" for row in self._rows)
        for name, data in ((PROGRESS, progress.model_dump_json()), (METRICS, lines)):
            if self._written.get(name) == data.encode():
                continue
            try:
                self._files.write(name, data.encode())
            except AsapError as error:
                self._log.warning("progress.not_written", code=error.problem_code)
                return
            self._written[name] = data.encode()
