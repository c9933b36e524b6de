from __future__ import annotations

import threading
import time

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from asap.errors import Misconfigured, UpstreamUnavailable
from asap_runtime.database import SECOND, Database, open_engine
from asap_runtime.migrate import upgrade


@pytest.fixture
def database(tmp_path):
    url = f"sqlite:///{tmp_path / 'asap.db'}"
    upgrade(url)
    database = Database(open_engine(url))
    yield database
    database.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("no url", "cannot be read"),
        ("mysql://host/db", "unknown"),
        ("postgresql://host/db", r"expected .*postgresql\+psycopg"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
    ],
)
def test_a_url_that_cannot_work_is_refused(url, said):
    with pytest.raises(Misconfigured, match=said):
        open_engine(url)


def test_a_refusal_shows_no_password():
    with pytest.raises(Misconfigured) as caught:
        open_engine("mysql://user:secret@host/db")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("pragma", "value"),
    [("journal_mode", "wal"), ("synchronous", 1), ("foreign_keys", 1), ("busy_timeout", 10_000)],
)
def test_sqlite_is_set_up_on_each_connection(database, pragma, value):
    with database.read() as connection:
        assert connection.exec_driver_sql(f"PRAGMA {pragma}").scalar() == value


def test_the_clock_is_the_databases(database):
    before = time.time()
    moment = database.time() / SECOND
    assert before - 1 < moment < time.time() + 1  # it counts milliseconds


def test_a_write_commits_or_leaves_nothing(database):
    insert = text("INSERT INTO idempotency VALUES ('t', 'k', 'h', 0, NULL, NULL, NULL)")
    count = text("SELECT count(*) FROM idempotency")
    with pytest.raises(RuntimeError), database.write() as connection:  # noqa: PT012
        connection.execute(insert)
        raise RuntimeError
    with database.write() as connection:
        assert connection.execute(count).scalar() == 0
        connection.execute(insert)
    with database.read() as connection:
        assert connection.execute(count).scalar() == 1


def test_writers_queue_and_readers_do_not(database):
    count = text("SELECT count(*) FROM idempotency")

    def write(number: int) -> None:
        with database.write() as connection:
            seen = connection.execute(count).scalar()
            time.sleep(0.002)
            values = f"('t', '{number}', 'h', {seen}, NULL, NULL, NULL)"
            connection.execute(text(f"INSERT INTO idempotency VALUES {values}"))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(20)]
    with database.read() as reader:
        assert reader.execute(count).scalar() == 0
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert reader.execute(count).scalar() == 0  # its snapshot
    with database.read() as connection:
        seen = connection.execute(text("SELECT created_at FROM idempotency")).scalars().all()
    assert sorted(seen) == list(range(20))


def test_errors_show_no_parameters(database):
    statement = text("INSERT INTO items (job_id, payload) VALUES (:job, :payload)")
    with pytest.raises(IntegrityError) as caught, database.write() as connection:
        connection.execute(statement, {"job": "j", "payload": b"words of a model"})
    assert "words" not in str(caught.value)


def test_an_unusable_file_is_unavailable_not_a_crash(tmp_path):
    database = Database(open_engine(f"sqlite:///{tmp_path / 'missing' / 'asap.db'}"))
    with pytest.raises(UpstreamUnavailable) as caught:
        database.time()
    assert caught.value.problem_code == "database-unavailable"
    assert caught.value.retryable
    database.close()
