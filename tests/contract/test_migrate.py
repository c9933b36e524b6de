"""One chain of migrations for every database, ending where the metadata stands."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from asap_runtime import migrate
from asap_runtime.database import Database, open_engine
from asap_runtime.migrate import at_head, upgrade
from asap_runtime.tables import metadata


@pytest.fixture
def empty(database_url):
    database = Database(open_engine(database_url))
    yield database
    database.close()


def test_an_empty_database_is_not_at_head(empty, database_url):
    assert not at_head(empty.engine)
    upgrade(database_url)
    assert at_head(empty.engine)
    upgrade(database_url)
    assert at_head(empty.engine)


def test_the_migrations_end_at_the_metadata(database):
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
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
    assert at_head(empty.engine)


REWRITE = """
import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade():
    with op.batch_alter_table("jobs", recreate="auto") as batch:
        batch.alter_column("kind", type_=sa.String(64), existing_nullable=False)
"""


def test_a_migration_that_rewrites_a_table_keeps_what_refers_to_it(
    platform, database_url, tmp_path, monkeypatch
):
    job_id = platform.job(3)
    chain = tmp_path / "migrations"
    shutil.copytree(migrate.MIGRATIONS, chain, ignore=shutil.ignore_patterns("__pycache__"))
    (chain / "versions" / "0002_rewrite.py").write_text(REWRITE)
    monkeypatch.setattr(migrate, "MIGRATIONS", chain)
    assert not at_head(platform.database.engine)
    upgrade(database_url)
    assert at_head(platform.database.engine)
    assert platform.statuses(job_id) == ["queued"] * 3
    assert len(platform.claim()) == 3


def test_a_newer_schema_is_not_at_head(empty, database_url):
    upgrade(database_url)
    with empty.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    assert not at_head(empty.engine)
