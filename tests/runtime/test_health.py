"""A worker's probes over real HTTP, on real SQLite and the memory queue."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager

import httpx
import pytest
from sqlalchemy import text

from asap.errors import CapacityError, Misconfigured
from asap_runtime.database import Database, open_engine
from asap_runtime.health import check_ready, serve_worker, worker_app
from asap_runtime.host import StageHost
from asap_runtime.logs import configure_logs
from asap_runtime.migrate import VERSION_TABLE, upgrade
from asap_runtime.queue import MemoryQueue, Message
from asap_runtime.settings import TelemetrySettings
from asap_runtime.stage import Done
from waiting import PATIENCE_S


class Plain:
    """A stage without a resource of its own."""

    name, concurrency = "anchor", 2

    def __init__(self):
        self.told = []

    async def start(self):
        self.told.append("start")

    async def process(self, record):
        return Done(record)

    async def stop(self):
        self.told.append("stop")


class Device(Plain):
    """A stage whose resource may break."""

    name = "surprisal"

    def __init__(self):
        super().__init__()
        self.loaded = asyncio.Event()
        self.loaded.set()
        self.trouble = None

    async def start(self):
        await self.loaded.wait()
        await super().start()

    async def ready(self):
        if self.trouble is not None:
            raise self.trouble


class Broker(MemoryQueue):
    """A queue that says of itself what the test wants."""

    age_s, up = 0.0, True

    def self_message_age_s(self):
        return self.age_s

    def healthy(self):
        return self.up


@pytest.fixture
def database(tmp_path):
    configure_logs(TelemetrySettings())
    url = f"sqlite:///{tmp_path}/asap.db"
    upgrade(url)
    opened = Database(open_engine(url))
    yield opened
    opened.close()


@asynccontextmanager
async def served(host, routes=()):
    async with (
        serve_worker(worker_app(host, routes), "127.0.0.1", 0) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as http,
    ):
        yield http


def code(answer):
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["code"]


async def test_a_running_worker_is_alive_ready_and_measured(database):
    host = StageHost(database, MemoryQueue(), [Plain(), Device()])
    async with served(host) as http, host:
        assert (await http.get("/healthz")).json() == {"status": "ok", "self_message_age_s": 0.0}
        assert (await http.get("/readyz")).json() == {"status": "ok", "broker": "ok"}
        metrics = await http.get("/metrics")
        assert "asap_worker_selfmessage_age_seconds 0.0" in metrics.text
        assert "asap_queue_up 1.0" in metrics.text
        assert code(await http.get("/nowhere")) == (404, "not-found")
        refusal = await http.post("/healthz")
        assert code(refusal) == (405, "method-not-allowed")
        assert "GET" in refusal.headers["allow"]


async def test_while_a_model_loads_the_worker_lives_and_is_not_ready(database):
    device = Device()
    device.loaded.clear()
    host = StageHost(database, MemoryQueue(), [device])
    async with served(host) as http:
        entering = asyncio.create_task(host.__aenter__())
        assert (await http.get("/healthz")).status_code == 200
        assert code(await http.get("/readyz")) == (503, "not-ready")
        assert "starting" in (await http.get("/readyz")).json()["detail"]
        device.loaded.set()
        await entering
        assert (await http.get("/readyz")).status_code == 200
        await host.__aexit__()
        assert code(await http.get("/readyz")) == (503, "not-ready")
        assert "draining" in (await http.get("/readyz")).json()["detail"]


async def test_a_broken_device_is_not_ready_until_it_works_again(database):
    device = Device()
    host = StageHost(database, MemoryQueue(), [Plain(), device])
    async with served(host) as http, host:
        device.trouble = CapacityError("the device is lost", code="not-ready")
        answer = await http.get("/readyz")
        assert code(answer) == (503, "not-ready")
        assert (answer.json()["detail"], answer.json()["title"]) == (
            "the device is lost", "Not ready",
        )  # fmt: skip
        assert (await http.get("/healthz")).status_code == 200
        device.trouble = None
        assert (await http.get("/readyz")).status_code == 200


async def test_an_old_schema_is_not_ready(database):
    host = StageHost(database, MemoryQueue(), [Plain()])
    await check_ready(host)
    async with served(host) as http, host:
        with database.write() as connection:
            connection.execute(text(f"DELETE FROM {VERSION_TABLE}"))
        assert code(await http.get("/readyz")) == (503, "not-ready")


async def test_a_database_that_is_away_is_not_ready(tmp_path):
    away = Database(open_engine(f"sqlite:///{tmp_path}/no-such-folder/asap.db"))
    host = StageHost(away, MemoryQueue(), [])
    host.phase = "running"
    async with served(host) as http:
        assert code(await http.get("/readyz")) == (503, "database-unavailable")
        assert (await http.get("/healthz")).status_code == 200
    away.close()


async def test_the_broker_and_a_full_queue_are_no_reason(database):
    queue = Broker(capacity=1)
    host = StageHost(database, queue, [Plain()])
    async with served(host) as http, host:
        queue.up = False
        assert (await http.get("/readyz")).json() == {"status": "ok", "broker": "not reachable"}
        assert "asap_queue_up 0.0" in (await http.get("/metrics")).text
        queue.stop_claiming()
        assert queue.publish(Message("anchor", ("1",)))
        assert not queue.publish(Message("anchor", ("2",)))
        for probe in ("/healthz", "/readyz"):
            assert (await http.get(probe)).status_code == 200


@pytest.mark.parametrize(
    ("age_s", "up", "status"), [(89.0, True, 200), (91.0, True, 503), (91.0, False, 200)]
)
async def test_deaf_to_a_healthy_broker_is_not_alive(database, age_s, up, status):
    queue = Broker()
    queue.age_s, queue.up = age_s, up
    host = StageHost(database, queue, [Plain()])
    async with served(host) as http, host:
        assert (await http.get("/healthz")).status_code == status
        assert f"asap_worker_selfmessage_age_seconds {age_s}" in (await http.get("/metrics")).text


async def test_a_stage_that_does_not_start_stops_those_before_it(database):
    class Broken(Device):
        async def start(self):
            raise Misconfigured("no such model")

    plain, broken = Plain(), Broken()
    host = StageHost(database, MemoryQueue(), [plain, broken])
    with pytest.raises(Misconfigured, match="no such model"):
        async with host:
            raise AssertionError("entered")
    assert (plain.told, broken.told) == (["start", "stop"], [])
    assert not host.queue.healthy()


async def test_a_port_that_is_taken_is_a_setting_that_cannot_work(database):
    app = worker_app(StageHost(database, MemoryQueue(), []))
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(Misconfigured, match="cannot listen"),
    ):
        async with serve_worker(app, "127.0.0.1", taken.getsockname()[1]):
            raise AssertionError("entered")
