"""Jobs, items, past problems, idempotency keys, webhook deliveries, trained models, deleted runs,
endpoints of served models, API keys and the audit trail.

Written out, not built from the metadata: a migration says what the schema was on its day.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_ROW_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Create all tables."""
    _create_jobs()
    _create_items()
    _create_problems()
    _create_idempotency()
    _create_deliveries()
    _create_models()
    _create_removals()
    _create_endpoints()
    _create_api_keys()
    _create_audit()
    if op.get_bind().dialect.name == "postgresql":
        # Every item is updated several times in its life; vacuum after 2 % of dead rows, not 20 %.
        op.execute(
            "ALTER TABLE items SET (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.02, "
            "autovacuum_analyze_scale_factor = 0.02)"
        )


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("config", sa.Text, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("trace", sa.String(128)),
        sa.Column("problem", sa.Text),
        sa.Column("webhook", sa.Text),
        sa.Column("source", sa.Text),
        sa.Column("intake_until", sa.BigInteger),
        sa.Column("cost", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("cost_cap", sa.BigInteger),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("ingested_at", sa.BigInteger),
        sa.Column("rejected_at", sa.BigInteger),
        sa.Column("cancelled_at", sa.BigInteger),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("finished_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
    )
    op.create_index("ix_jobs_tenant", "jobs", ["tenant", "created_at", "id"])
    _create_partial_index("ix_jobs_unfinished", "jobs", ["created_at"], "finished_at IS NULL")
    op.create_index("ix_jobs_finished", "jobs", ["finished_at"])
    _create_partial_index(
        "ix_jobs_intake",
        "jobs",
        ["intake_until"],
        "source IS NOT NULL AND ingested_at IS NULL AND finished_at IS NULL",
    )


def _create_items() -> None:
    op.create_table(
        "items",
        sa.Column("id", _ROW_ID, nullable=False),
        sa.Column("job_id", sa.String(32), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("stage", sa.String(32)),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("fence", sa.BigInteger, nullable=False),
        sa.Column("not_before", sa.BigInteger, nullable=False),
        sa.Column("lease_owner", sa.String(128)),
        sa.Column("lease_until", sa.BigInteger),
        sa.Column("lease_losses", sa.Integer, nullable=False),
        sa.Column("published_at", sa.BigInteger),
        sa.Column("finished_at", sa.BigInteger),
        sa.Column("line", sa.Integer, nullable=False),
        sa.Column("custom_id", sa.String(512)),
        sa.Column("content_hash", sa.String(64)),
        sa.Column("cost", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("problem_code", sa.String(64)),
        sa.Column("problem", sa.Text),
        sa.Column("payload", sa.LargeBinary),
        sa.PrimaryKeyConstraint("id", name="pk_items"),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name="fk_items_job_id", ondelete="CASCADE"
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_items_position", "items", ["job_id", "position"], unique=True)
    op.create_index("ix_items_counts", "items", ["job_id", "status", "stage"])
    queued = "status = 'queued'"
    _create_partial_index(
        "ix_items_ready", "items", ["stage", "priority", "tenant", "position"], queued
    )
    _create_partial_index(
        "ix_items_leases", "items", ["lease_until", "stage"], "status = 'running'"
    )
    _create_partial_index(
        "ix_items_published",
        "items",
        ["stage", "published_at"],
        "published_at IS NOT NULL",
    )
    _create_partial_index(
        "ix_items_custom_id",
        "items",
        ["job_id", "custom_id"],
        "custom_id IS NOT NULL",
        unique=True,
    )


def _create_problems() -> None:
    op.create_table(
        "problems",
        sa.Column("item_id", _ROW_ID, nullable=False),
        sa.Column("fence", sa.BigInteger, nullable=False),
        sa.Column("problem", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("item_id", "fence", name="pk_problems"),
        sa.ForeignKeyConstraint(
            ["item_id"], ["items.id"], name="fk_problems_item_id", ondelete="CASCADE"
        ),
        comment="How earlier attempt series of an item ended.",
    )


def _create_idempotency() -> None:
    op.create_table(
        "idempotency",
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("request_hash", sa.String(64), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("job_id", sa.String(32)),
        sa.Column("status", sa.Integer),
        sa.Column("body", sa.LargeBinary),
        sa.PrimaryKeyConstraint("tenant", "key", name="pk_idempotency"),
    )
    op.create_index("ix_idempotency_created", "idempotency", ["created_at"])


def _create_deliveries() -> None:
    op.create_table(
        "deliveries",
        sa.Column("job_id", sa.String(32), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("not_before", sa.BigInteger, nullable=False),
        sa.Column("ended_at", sa.BigInteger),
        sa.Column("outcome", sa.String(64)),
        sa.PrimaryKeyConstraint("job_id", name="pk_deliveries"),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name="fk_deliveries_job_id", ondelete="CASCADE"
        ),
        comment="Webhooks of finished jobs: one row, written with the end of the job.",
    )
    _create_partial_index("ix_deliveries_due", "deliveries", ["not_before"], "ended_at IS NULL")


def _create_models() -> None:
    op.create_table(
        "models",
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("stage", sa.String(16), nullable=False),
        sa.Column("prefix", sa.Text, nullable=False),
        sa.Column("manifest_sha256", sa.String(64), nullable=False),
        sa.Column("base", sa.Text, nullable=False),
        sa.Column("job_id", sa.String(32), nullable=False),
        sa.Column("meta", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("removed_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("tenant", "name", "version", name="pk_models"),
        comment=(
            "Trained models, one row a version; a removed one keeps its row, and so its number."
        ),
    )
    op.create_index("ix_models_job", "models", ["job_id"], unique=True)
    _create_partial_index(
        "ix_models_production", "models", ["tenant", "name"], "stage = 'production'", unique=True
    )


def _create_removals() -> None:
    op.create_table(
        "removals",
        sa.Column("job_id", sa.String(32), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("removed_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("job_id", name="pk_removals"),
        comment="Deleted training jobs; their files are deleted once more, an hour later.",
    )


def _create_endpoints() -> None:
    op.create_table(
        "endpoints",
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("url", sa.String(255), nullable=False),
        sa.Column("version", sa.Integer),
        sa.Column("draining", sa.Integer, nullable=False),
        sa.Column("baseline_tokens", sa.Float),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("lease_until", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "model", "url", name="pk_endpoints"),
        comment="Servers of models; a row whose lease is not renewed is none.",
    )
    op.create_index("ix_endpoints_lease", "endpoints", ["lease_until"])


def _create_api_keys() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("secret_hash", sa.String(64), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("revoked_at", sa.BigInteger),
        sa.Column("last_used_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
    )
    op.create_index("ix_api_keys_tenant", "api_keys", ["tenant", "created_at"])


def _create_audit() -> None:
    op.create_table(
        "audit",
        sa.Column("id", _ROW_ID, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("actor", sa.String(64), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("object", sa.String(128), nullable=False),
        sa.Column("result", sa.String(64), nullable=False),
        sa.Column("request_id", sa.String(64)),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
        comment="Who did what; rows are added and, after their time, removed, never changed.",
    )
    op.create_index("ix_audit_at", "audit", ["at"])


def _create_partial_index(
    name: str, table: str, columns: list[str], where: str, *, unique: bool = False
) -> None:
    condition = sa.text(where)
    op.create_index(
        name,
        table,
        columns,
        unique=unique,
        sqlite_where=condition,
        postgresql_where=condition,
    )
