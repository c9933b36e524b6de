"""Real engines, started once per session."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from asap_runtime.database import Database, open_engine
from asap_runtime.migrate import upgrade
from engines import postgres
from engines.vllm_server import VllmServer, missing, serve
from job_store import PATIENT, Platform, enter_race
from waiting import PATIENCE_S


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory) -> Iterator[VllmServer]:
    """A vLLM server with a tiny random model; the tests that use it skip where vLLM is missing."""
    if reason := missing():
        pytest.skip(reason)
    from tiny_model import build_tiny_model

    directory = build_tiny_model(tmp_path_factory.mktemp("served"), max_positions=4096)
    with serve(directory) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.PostgresServer]:
    """A PostgreSQL server; the tests that use it skip where it is missing."""
    if reason := postgres.missing():
        pytest.skip(reason)
    with postgres.serve() as server:
        yield server


@pytest.fixture(autouse=True)
def patient_databases(monkeypatch) -> None:
    """No database is given up because the machine stood still for a while."""
    for name, limit_s in PATIENT.items():
        monkeypatch.setattr(f"asap_runtime.database.{name}", limit_s)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.contract)])
def database_url(request, tmp_path) -> Iterator[str]:
    """The URL of an empty database, of each kind in turn."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'asap.db'}"
        return
    server = request.getfixturevalue("postgres_server")
    url = server.create_database()
    yield url
    server.drop_database(url)


@pytest.fixture
def database(database_url) -> Iterator[Database]:
    """A migrated database, with a connection for each thread that a test starts."""
    upgrade(database_url)
    database = Database(open_engine(database_url, pool_size=8))
    yield database
    database.close()


@pytest.fixture
def platform(database) -> Platform:
    """All sides of the job store on that database."""
    return Platform(database)


@pytest.fixture
def racers() -> Iterator[ProcessPoolExecutor]:
    """Four fresh processes that begin, and may meet again, at the same moment."""
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(4, timeout=4 * PATIENCE_S)
    with ProcessPoolExecutor(
        4, mp_context=context, initializer=enter_race, initargs=(start,)
    ) as pool:
        yield pool
