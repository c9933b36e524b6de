"""The tables of the job store, for SQLite and PostgreSQL alike. Knows no engine and no query.

Times are integer microseconds since the epoch, always computed by the database; money is integer
millionths of a US dollar. Statuses, stages
and the index that serves each question are those of the delivery rules: the item row is the truth,
a message is a hint.
"""

from __future__ import annotations

from typing import Final, Literal

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
)
from sqlalchemy.sql.elements import TextClause

__all__ = [
    "FINAL",
    "OPEN",
    "ItemStatus",
    "api_keys",
    "audit",
    "deliveries",
    "endpoints",
    "idempotency",
    "items",
    "jobs",
    "metadata",
    "models",
    "problems",
    "removals",
]

ItemStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
OPEN: Final[tuple[ItemStatus, ...]] = ("queued", "running")
FINAL: Final[tuple[ItemStatus, ...]] = ("succeeded", "failed", "cancelled")

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)
# SQLite numbers rows by itself only for a column of type INTEGER.
_ROW_ID = BigInteger().with_variant(Integer, "sqlite")
_MICROSECONDS = BigInteger


def _partial(name: str, *columns: str, where: str) -> Index:
    condition: TextClause = text(where)
    return Index(name, *columns, sqlite_where=condition, postgresql_where=condition)


jobs = Table(
    "jobs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("config", Text, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("trace", String(128)),
    Column("problem", Text),
    Column("webhook", Text),  # where the end of the job is reported
    Column("source", Text),  # JSON: the blob that holds the lines, until they are taken in
    Column("intake_until", _MICROSECONDS),  # lease of the process that takes them in
    Column("cost", BigInteger, nullable=False, server_default="0"),
    Column("cost_cap", BigInteger),
    # Facts, each set once; the phase is derived from them and from the items.
    Column("created_at", _MICROSECONDS, nullable=False),
    Column("ingested_at", _MICROSECONDS),
    Column("rejected_at", _MICROSECONDS),
    Column("cancelled_at", _MICROSECONDS),
    Column("expires_at", _MICROSECONDS),
    Column("finished_at", _MICROSECONDS),
    Index("ix_jobs_tenant", "tenant", "created_at", "id"),
    _partial("ix_jobs_unfinished", "created_at", where="finished_at IS NULL"),
    Index("ix_jobs_finished", "finished_at"),
    _partial(
        "ix_jobs_intake",
        "intake_until",
        where="source IS NOT NULL AND ingested_at IS NULL AND finished_at IS NULL",
    ),
)

items = Table(
    "items",
    metadata,
    Column("id", _ROW_ID, primary_key=True),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("tenant", String(64), nullable=False),  # the job's, for turns between tenants
    Column("position", Integer, nullable=False),
    Column("stage", String(32)),
    Column("status", String(16), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("not_before", _MICROSECONDS, nullable=False),
    Column("lease_owner", String(128)),
    Column("lease_until", _MICROSECONDS),
    Column("lease_losses", Integer, nullable=False),
    Column("published_at", _MICROSECONDS),
    Column("finished_at", _MICROSECONDS),
    Column("line", Integer, nullable=False),
    Column("custom_id", String(512)),
    Column("content_hash", String(64)),
    Column("cost", BigInteger, nullable=False, server_default="0"),
    Column("problem_code", String(64)),
    # Last, so that SQLite reads the rest of a row without its overflow pages.
    Column("problem", Text),
    Column("payload", LargeBinary),
    Index("ix_items_position", "job_id", "position", unique=True),
    Index("ix_items_counts", "job_id", "status", "stage"),
    _partial(
        "ix_items_ready", "stage", "priority", "tenant", "position", where="status = 'queued'"
    ),
    _partial("ix_items_leases", "lease_until", "stage", where="status = 'running'"),
    # Only queued items are published; to say so would let other queued items stand in the way.
    _partial("ix_items_published", "stage", "published_at", where="published_at IS NOT NULL"),
    Index(
        "ix_items_custom_id",
        "job_id",
        "custom_id",
        unique=True,
        sqlite_where=text("custom_id IS NOT NULL"),
        postgresql_where=text("custom_id IS NOT NULL"),
    ),
    # A deleted row's id is never given again: a stale message must not name another item.
    sqlite_autoincrement=True,
)

problems = Table(
    "problems",
    metadata,
    Column("item_id", ForeignKey("items.id", ondelete="CASCADE"), primary_key=True),
    Column("fence", BigInteger, primary_key=True),
    Column("problem", Text, nullable=False),
    comment="How earlier attempt series of an item ended.",
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("tenant", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("request_hash", String(64), nullable=False),
    Column("created_at", _MICROSECONDS, nullable=False),
    Column("job_id", String(32)),
    Column("status", Integer),
    Column("body", LargeBinary),
    Index("ix_idempotency_created", "created_at"),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("not_before", _MICROSECONDS, nullable=False),
    Column("ended_at", _MICROSECONDS),
    Column("outcome", String(64)),
    _partial("ix_deliveries_due", "not_before", where="ended_at IS NULL"),
    comment="Webhooks of finished jobs: one row, written with the end of the job.",
)

models = Table(
    "models",
    metadata,
    Column("tenant", String(64), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("version", Integer, primary_key=True),  # 1, 2, … and never given again
    Column("stage", String(16), nullable=False),
    Column("prefix", Text, nullable=False),  # of its files in the blob store
    Column("manifest_sha256", String(64), nullable=False),
    Column("base", Text, nullable=False),
    Column("job_id", String(32), nullable=False),  # outlives the job
    Column("meta", Text, nullable=False),
    Column("created_at", _MICROSECONDS, nullable=False),
    Column("removed_at", _MICROSECONDS),
    Index("ix_models_job", "job_id", unique=True),
    Index(
        "ix_models_production",
        "tenant",
        "name",
        unique=True,
        sqlite_where=text("stage = 'production'"),
        postgresql_where=text("stage = 'production'"),
    ),
    comment="Trained models, one row a version; a removed one keeps its row, and so its number.",
)

removals = Table(
    "removals",
    metadata,
    Column("job_id", String(32), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("removed_at", _MICROSECONDS, nullable=False),
    comment="Deleted training jobs; their files are deleted once more, an hour later.",
)

endpoints = Table(
    "endpoints",
    metadata,
    Column("tenant", String(64), primary_key=True),
    Column("model", String(64), primary_key=True),
    Column("url", String(255), primary_key=True),
    Column("version", Integer),
    Column("draining", Integer, nullable=False),  # 1: no new requests
    Column("baseline_tokens", Float),
    Column("created_at", _MICROSECONDS, nullable=False),
    Column("lease_until", _MICROSECONDS, nullable=False),
    Index("ix_endpoints_lease", "lease_until"),
    comment="Servers of models; a row whose lease is not renewed is none.",
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("name", String(128), nullable=False),
    Column("role", String(16), nullable=False),
    Column("secret_hash", String(64), nullable=False),
    Column("created_at", _MICROSECONDS, nullable=False),
    Column("expires_at", _MICROSECONDS),
    Column("revoked_at", _MICROSECONDS),
    Column("last_used_at", _MICROSECONDS),
    Index("ix_api_keys_tenant", "tenant", "created_at"),
)

audit = Table(
    "audit",
    metadata,
    Column("id", _ROW_ID, primary_key=True),
    Column("at", _MICROSECONDS, nullable=False),
    Column("tenant", String(64), nullable=False),
    Column("actor", String(64), nullable=False),
    Column("action", String(64), nullable=False),
    Column("object", String(128), nullable=False),
    Column("result", String(64), nullable=False),
    Column("request_id", String(64)),
    Index("ix_audit_at", "at"),
    comment="Who did what; rows are added and, after their time, removed, never changed.",
)
