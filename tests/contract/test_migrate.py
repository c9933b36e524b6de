"""One chain of migrations for every database, ending where the metadata stands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from asap.errors import UpstreamUnavailable
from asap_runtime import migrate
from asap_runtime.database import Database, open_engine
from asap_runtime.host import open_database
from asap_runtime.migrate import VERSION_TABLE, has_schema, upgrade
from asap_runtime.settings import RuntimeSettings
from asap_runtime.tables import metadata
from asap_runtime.values import Outcome


@pytest.fixture
def empty(database_url):
    database = Database(open_engine(database_url))
    yield database
    database.close()


def test_an_empty_database_is_not_has_schema(empty, database_url):
    assert not has_schema(empty.engine)
    upgrade(database_url)
    assert has_schema(empty.engine)
    upgrade(database_url)
    assert has_schema(empty.engine)


def test_another_application_may_use_the_same_database(empty, database_url):
    with empty.write() as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('5f0c11aa')"))
    assert not has_schema(empty.engine)
    upgrade(database_url)
    assert has_schema(empty.engine)
    with empty.read() as connection:
        theirs = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
    assert theirs == "5f0c11aa"


def test_the_migrations_end_at_the_metadata(database):
    with database.engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "version_table": VERSION_TABLE}
        )
        assert compare_metadata(context, metadata) == []


def test_the_partial_indexes_are_those_of_the_metadata(database):
    """The comparison above does not look at conditions."""
    option = f"{database.engine.dialect.name}_where"
    found = {
        index["name"]: str(index.get("dialect_options", {}).get(option, ""))
        for table in metadata.tables
        for index in inspect(database.engine).get_indexes(table)
    }
    for table in metadata.tables.values():
        for index in table.indexes:
            wanted = index.dialect_options[database.engine.dialect.name]["where"]
            assert _plain(found[index.name]) == _plain("" if wanted is None else str(wanted))


def _plain(condition: str) -> str:
    return condition.replace("::text", "").replace("(", "").replace(")", "")


def test_of_callers_at_once_one_migrates(empty, database_url):
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: upgrade(database_url), range(3)))
    assert has_schema(empty.engine)


REWRITE = """
import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade():
    with op.batch_alter_table("jobs", recreate="auto") as batch:
        batch.alter_column("kind", type_=sa.String(64), existing_nullable=False)
"""
ADD = """
import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade():
    op.add_column("items", sa.Column("mood", sa.String))
    op.create_table("moods", sa.Column("name", sa.String, primary_key=True))
"""


@pytest.fixture
def release(tmp_path, monkeypatch):
    """Make the code that of another release: with one migration more, or with none again."""
    now = migrate.MIGRATIONS

    def use(migration=None):
        chain = now
        if migration is not None:
            chain = tmp_path / "migrations"
            shutil.copytree(now, chain, ignore=shutil.ignore_patterns("__pycache__"))
            (chain / "versions" / "0002_more.py").write_text(migration)
        monkeypatch.setattr(migrate, "MIGRATIONS", chain)

    return use


def test_a_migration_that_rewrites_a_table_keeps_what_refers_to_it(platform, database_url, release):
    job_id = platform.job(3)
    release(REWRITE)
    assert not has_schema(platform.database.engine)
    upgrade(database_url)
    assert has_schema(platform.database.engine)
    assert platform.statuses(job_id) == ["queued"] * 3
    assert len(platform.claim()) == 3


def revision(database):
    with database.read() as connection:
        return connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar_one()


def test_processes_of_the_release_before_go_on_with_the_new_schema(platform, database_url, release):
    before = platform.job(3)
    held = platform.claim(1)
    release(ADD)
    upgrade(database_url)
    release()
    assert has_schema(platform.database.engine)  # ready, and started anew as well
    settings = RuntimeSettings(database={"url": database_url})
    open_database(settings, migrate=True).close()
    open_database(settings).close()
    assert revision(platform.database) == "0002"
    after = platform.job(2)
    for claim in [*held, *platform.claim(9)]:
        assert platform.store.finish([Outcome.done(claim, claim.payload, None)])
    assert platform.statuses(before) == ["succeeded"] * 3
    assert platform.statuses(after) == ["succeeded"] * 2


def test_a_server_is_migrated_by_who_says_so_a_file_by_who_opens_it(
    empty, database_url, tmp_path, release
):
    settings = RuntimeSettings(home=tmp_path, database={"url": database_url})
    is_file = empty.is_sqlite
    for migration, newest in ((None, "0001"), (ADD, "0002")):
        release(migration)
        if not is_file:
            with pytest.raises(UpstreamUnavailable, match="`asap db upgrade`") as caught:
                open_database(settings)
            assert caught.value.problem_code == "not-ready"
            assert not has_schema(empty.engine)
        open_database(settings, migrate=not is_file).close()
        assert revision(empty) == newest


@pytest.mark.contract
@pytest.mark.parametrize("command", [("gateway",), ("worker", "anchor"), ("keys", "list")])
def test_a_process_of_several_does_not_start_before_the_schema_is_there(
    postgres_server, tmp_path, command
):
    url = postgres_server.create_database()
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "ASAP_DATABASE__URL": url}
    ran = subprocess.run(
        [sys.executable, "-m", "asap_cli.main", *command],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, "asap db upgrade" in ran.stderr) == (69, True), ran.stderr
    assert "Traceback" not in ran.stderr
    database = Database(open_engine(url))
    assert not inspect(database.engine).get_table_names()
    database.close()
    postgres_server.drop_database(url)
