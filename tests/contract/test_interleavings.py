"""Any interleaving of workers, sweeper and tenant ends each item once; fences only grow."""

from __future__ import annotations

import tempfile

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
)
from sqlalchemy import select

from asap_runtime.database import Database, open_engine
from asap_runtime.migrate import upgrade
from asap_runtime.tables import FINAL, items
from asap_runtime.values import Claimed, Outcome
from job_store import PROBLEM, TENANT, Platform

SIZE = 4
stages = st.sampled_from(["one", "two"])


class Interleavings(RuleBasedStateMachine):
    """The model: who holds each item, how often it ended, and its highest fence."""

    claims = Bundle("claims")

    @initialize()
    def open(self):
        self.folder = tempfile.TemporaryDirectory()
        url = f"sqlite:///{self.folder.name}/asap.db"
        upgrade(url)
        self.platform = Platform(Database(open_engine(url)))
        self.job_id = self.platform.job(SIZE)
        self.holder: dict[int, int] = {}
        self.fences = dict.fromkeys(self.platform.ids(), 0)
        self.ends = dict.fromkeys(self.fences, 0)
        self.cancelled = False

    def _note(self, claims: list[Claimed]) -> list[Claimed]:
        for claim in claims:
            assert not self.cancelled
            assert claim.id not in self.holder
            assert self.ends[claim.id] == 0
            assert claim.fence == self.fences[claim.id] + 1
            self.fences[claim.id] = self.holder[claim.id] = claim.fence
        return claims

    def _write(self, outcome: Outcome, *, ends: bool = False) -> None:
        claim = outcome.claim
        held = not self.cancelled and self.holder.get(claim.id) == claim.fence
        assert self.platform.store.finish([outcome]) == ({claim.id} if held else set())
        if held:
            del self.holder[claim.id]
            self.ends[claim.id] += ends

    @rule(target=claims, stage=stages, limit=st.integers(1, SIZE))
    def claim_next(self, stage, limit):
        return multiple(*self._note(self.platform.claim(limit, stage)))

    @rule(target=claims, stage=stages, picked=st.sets(st.integers(0, SIZE - 1)))
    def claim_message(self, stage, picked):
        ids = [list(self.fences)[n] for n in picked]
        return multiple(*self._note(self.platform.store.claim(ids, stage, "other")))

    @rule(claim=claims)
    def advance(self, claim):
        following = "two" if claim.stage == "one" else None
        self._write(Outcome.done(claim, b"{}", following), ends=following is None)

    @rule(claim=claims, seconds=st.sampled_from([0, 20]))
    def wait(self, claim, seconds):
        self._write(Outcome.wait(claim, b"{}", seconds))

    @rule(claim=claims, delay_s=st.sampled_from([0, 20]))
    def retry(self, claim, delay_s):
        self._write(Outcome.retry(claim, PROBLEM, delay_s))

    @rule(claim=claims)
    def fail(self, claim):
        self._write(Outcome.fail(claim, PROBLEM), ends=True)

    @rule(claim=claims)
    def release(self, claim):
        self._write(Outcome.release(claim))

    @rule(claim=claims)
    def heartbeat(self, claim):
        held = not self.cancelled and self.holder.get(claim.id) == claim.fence
        assert self.platform.store.heartbeat([claim]) == ({claim.id} if held else set())

    @rule()
    def expire(self):
        self.platform.pass_time(61)
        expired = self.platform.sweep.expire_leases(100)
        if not self.cancelled:
            assert expired.requeued + expired.failed == len(self.holder)
        for item_id in self.holder:
            self.ends[item_id] += self._status(item_id) == "failed"
        self.holder.clear()

    @rule()
    def publish(self):
        self.platform.sweep.mark_published(self.platform.sweep.due("one", 10))

    # A cancelled job has little more to show: rare, and never first.
    @rule(sure=st.integers(0, 9))
    def cancel(self, sure):
        if sure == 0 and sum(self.fences.values()) > SIZE:
            self._cancel()

    def _cancel(self) -> None:
        if not self.cancelled:
            for item_id in self.ends:
                self.ends[item_id] += self._status(item_id) not in FINAL
        assert self.platform.ledger.cancel(TENANT, self.job_id)
        self.cancelled = True
        self.holder.clear()

    def _status(self, item_id: int) -> str:
        return self._column(items.c.status)[item_id]

    def _column(self, column) -> dict[int, object]:
        with self.platform.database.read() as connection:
            return dict(connection.execute(select(items.c.id, column)).all())

    @invariant()
    def rows_agree_with_the_model(self):
        assert self._column(items.c.fence) == self.fences
        statuses = self._column(items.c.status)
        assert {id for id, status in statuses.items() if status == "running"} == set(self.holder)
        assert {id: int(status in FINAL) for id, status in statuses.items()} == self.ends

    def teardown(self):
        while not self.cancelled and not all(self.ends.values()):
            self.expire()
            for stage in ("one", "two"):
                for claim in self._note(self.platform.claim(stage=stage)):
                    self.advance(claim)
        assert set(self.ends.values()) == {1}
        assert self.platform.sweep.finish_jobs(10) == 1
        assert self.platform.phase(self.job_id) == ("cancelled" if self.cancelled else "done")
        self.platform.database.close()
        self.folder.cleanup()


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
