"""How Alembic runs our migrations: on the connection of `asap_runtime.migrate`, both dialects."""

from __future__ import annotations

from alembic import context

from asap_runtime.migrate import VERSION_TABLE
from asap_runtime.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,  # SQLite changes a column by rewriting its table
)
context.run_migrations()
