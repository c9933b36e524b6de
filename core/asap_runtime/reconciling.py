"""Stops launched work whose job has ended: cancelled, deleted, rejected, late or done.

The rows say what may run, so nothing has to be delivered and nothing remembered: a worker that was
away finds what is left over when it is back. A stage names what it has launched *before* its jobs
are looked up, and it launches for an item that it holds; what is launched in between is not named
yet, so nothing that may run is ever stopped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from sqlalchemy import exists, select

from asap.errors import AsapError
from asap_runtime.database import Database
from asap_runtime.logs import get_logger
from asap_runtime.stage import Launching, Stage
from asap_runtime.store import is_live
from asap_runtime.tables import OPEN, items, jobs

__all__ = ["PERIOD_S", "jobs_at_work", "reconcile"]

PERIOD_S = 3.0
"""How soon launched work hears of a cancel; a question over the few jobs that are launched."""


def jobs_at_work(database: Database, job_ids: Sequence[str], stage: str) -> set[str]:
    """Of these jobs those that are live and have an open item at the stage. Blocking."""
    if not job_ids:
        return set()
    has_open = exists().where(
        items.c.job_id == jobs.c.id, items.c.stage == stage, items.c.status.in_(OPEN)
    )
    statement = select(jobs.c.id).where(jobs.c.id.in_(job_ids), is_live(), has_open)
    with database.read() as connection:
        return set(connection.execute(statement).scalars())


async def reconcile(database: Database, stages: Sequence[Stage[Any]]) -> None:
    """Ask the stages that launch, again and again, until cancelled; trouble is logged."""
    launching = [stage for stage in stages if isinstance(stage, Launching)]
    log = get_logger()
    while launching:
        for stage in launching:
            try:
                await _stop_others(database, stage, stage.name)
            except AsapError as error:
                log.warning("reconcile.failed", stage=stage.name, code=error.problem_code)
            except Exception:
                log.exception("reconcile.crashed", stage=stage.name)
        await asyncio.sleep(PERIOD_S)


async def _stop_others(database: Database, stage: Launching, name: str) -> None:
    launched = await stage.launched()
    at_work = await asyncio.to_thread(jobs_at_work, database, launched, name)
    for job_id in launched:
        if job_id not in at_work:
            get_logger().info("work.stopped", stage=name, job_id=job_id)
            await stage.cancel(job_id)
