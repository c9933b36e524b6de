"""The schema's version: bring a database to the newest one, or ask whether it will do.

A release only adds to the schema of the one before, and what it no longer needs goes with the next.
So a schema from the future will do: old processes go on working while new ones take their places.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, event, func, select, text

from asap_runtime.database import SWEEPER_LOCK, Database, open_engine

__all__ = ["VERSION_TABLE", "has_schema", "upgrade"]

MIGRATIONS = Path(__file__).with_name("migrations")
VERSION_TABLE = "asap_schema"
"""Not Alembic's own name for it: another application may keep its tables in the same database."""


def upgrade(url: str) -> None:
    """Run the missing migrations in one transaction; of several callers at once, one does it. The
    schema of a later release is left as it is.

    On PostgreSQL a lock that is not had within 2 s ends the migration instead of queueing all other
    queries behind it.
    """
    database = Database(open_engine(url))
    if database.is_sqlite:
        event.listen(database.engine, "connect", _let_tables_go)
    try:
        with database.write() as connection:
            if not database.is_sqlite:
                # Waits for another migration; the sweeper's key is the same with one added.
                connection.execute(select(func.pg_advisory_xact_lock(SWEEPER_LOCK + 1)))
                connection.execute(text("SET LOCAL lock_timeout = '2s'"))
                connection.execute(text("SET LOCAL statement_timeout = 0"))
            config = _config()
            config.attributes["connection"] = connection
            if not _will_do(connection):
                command.upgrade(config, "head")
    finally:
        database.close()


def has_schema(engine: Engine) -> bool:
    """Whether the database has the newest schema known here, or a later one; False also when it has
    none.
    """
    with Database(engine).read() as connection:
        return _will_do(connection)


def _will_do(connection: Connection) -> bool:
    scripts = ScriptDirectory.from_config(_config())
    older = {script.revision for script in scripts.walk_revisions()} - set(scripts.get_heads())
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    there = set(context.get_current_heads())
    return bool(there) and not there & older


def _let_tables_go(connection: sqlite3.Connection, record: object) -> None:
    # SQLite changes a table by copying and dropping it, and a drop deletes what refers to its rows.
    connection.execute("PRAGMA foreign_keys = OFF")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
