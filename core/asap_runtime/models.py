"""The registry of trained models: names, numbered versions, and which of them is in production.

A version's files lie below its prefix in the blob store and are not this module's. Numbers are
given once: those of a removed version do not come back, so `name@version` never changes its
meaning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import JsonValue
from sqlalchemy import ColumnElement, Row, Select, and_, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from asap.errors import Conflict, InvalidInput, NotFound, UpstreamUnavailable
from asap_runtime.database import Database, now
from asap_runtime.tables import models

__all__ = [
    "MODEL_NAME",
    "STAGES",
    "ModelRegistry",
    "ModelStage",
    "ModelVersion",
    "parse_reference",
]

ModelStage = Literal["none", "staging", "production"]
STAGES: Final[tuple[ModelStage, ...]] = ("none", "staging", "production")
MODEL_NAME: Final = r"^[a-z0-9][a-z0-9._-]{0,62}$"
_REFERENCE = re.compile(r"(?P<name>[a-z0-9][a-z0-9._-]{0,62})@(?P<version>[1-9]\d{0,8})")
TRIES = 10
"""Of a number that others take at the same moment."""


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A trained model. `created_at` is in microseconds since the epoch, `meta` holds figures."""

    name: str
    version: int
    stage: ModelStage
    prefix: str
    manifest_sha256: str
    base: str
    job_id: str
    created_at: int
    meta: Mapping[str, JsonValue]

    @property
    def reference(self) -> str:
        """`name@version`; its place in `list`, too."""
        return f"{self.name}@{self.version}"


def parse_reference(text: str) -> tuple[str, int] | None:
    """Name and version of `name@version`; None for what is no such reference, such as a hub name
    or a path.
    """
    found = _REFERENCE.fullmatch(text)
    return (found["name"], int(found["version"])) if found else None


class ModelRegistry:
    """The models of all tenants. Blocking; safe to share between threads.

    Another tenant's model does not exist, and neither does a removed one.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        tenant: str,
        name: str,
        *,
        prefix: str,
        manifest_sha256: str,
        base: str,
        job_id: str,
        meta: Mapping[str, JsonValue],
    ) -> ModelVersion:
        """The next version of the name. A job has one model: once more for the same job is the
        version that it has.
        """
        last = select(func.coalesce(func.max(models.c.version), 0) + 1).where(
            models.c.tenant == tenant, models.c.name == name
        )
        row: dict[str, Any] = {
            "tenant": tenant,
            "name": name,
            "version": last.scalar_subquery(),
            "stage": "none",
            "prefix": prefix,
            "manifest_sha256": manifest_sha256,
            "base": base,
            "job_id": job_id,
            "meta": json.dumps(dict(meta)),
            "created_at": now(),
        }
        for _ in range(TRIES):
            known = self._once_made(job_id)
            if known is not None:
                return known
            try:
                with self._database.write() as connection:
                    connection.execute(insert(models).values(row))
            except IntegrityError:  # the number, or the job, was another's a moment ago
                continue
        known = self._once_made(job_id)
        if known is None:
            raise UpstreamUnavailable(
                f"too many versions of {name!r} come at once", code="database-unavailable"
            )
        return known

    def get(self, tenant: str, name: str, version: int | None = None) -> ModelVersion:
        """A version; without a number the one in production, else the newest. Raises NotFound."""
        statement = _present(tenant, name)
        if version is not None:
            statement = statement.where(models.c.version == version)
        in_production = models.c.stage == "production"
        first = statement.order_by(in_production.desc(), models.c.version.desc()).limit(1)
        with self._database.read() as connection:
            row = connection.execute(first).one_or_none()
        if row is None:
            raise _missing(name, version)
        return _version(row)

    def list(
        self,
        tenant: str,
        *,
        name: str | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> list[ModelVersion]:
        """Versions after the cursor, a `reference`: by name, the newest of each first."""
        statement = _present(tenant, name).order_by(models.c.name, models.c.version.desc())
        if cursor is not None:
            place = parse_reference(cursor)
            if place is None:
                raise InvalidInput("the cursor is not one of ours; expected an earlier page's")
            same = and_(models.c.name == place[0], models.c.version < place[1])
            statement = statement.where(or_(models.c.name > place[0], same))
        with self._database.read() as connection:
            return [_version(row) for row in connection.execute(statement.limit(limit))]

    def set_stage(self, tenant: str, name: str, version: int, stage: ModelStage) -> ModelVersion:
        """Move a version; into production it takes the place of the one that was there, which is
        in no stage afterwards. Raises NotFound.
        """
        all_of_name = select(models.c.version).where(*_named(tenant, name))
        with self._database.write() as connection:
            # One promotion of a name at a time: two would each leave the other's in production.
            connection.execute(all_of_name.order_by(models.c.version).with_for_update())
            if stage == "production":
                connection.execute(
                    update(models)
                    .where(*_named(tenant, name), models.c.stage == "production")
                    .values(stage="none")
                )
            moved = connection.execute(
                update(models)
                .where(*_named(tenant, name), models.c.version == version)
                .values(stage=stage)
            ).rowcount
            if not moved:
                raise _missing(name, version)  # and nothing is demoted: the block rolls back
        return self.get(tenant, name, version)

    def annotate(
        self, tenant: str, name: str, version: int, key: str, value: JsonValue
    ) -> ModelVersion:
        """Add a figure to a version's `meta`, or change it; the others stay. Raises NotFound."""
        this = (*_named(tenant, name), models.c.version == version)
        with self._database.write() as connection:
            found = select(models.c.meta).where(*this).with_for_update()
            meta = connection.execute(found).scalar_one_or_none()
            if meta is None:
                raise _missing(name, version)
            changed = json.dumps({**json.loads(meta), key: value})
            connection.execute(update(models).where(*this).values(meta=changed))
        return self.get(tenant, name, version)

    def remove(self, tenant: str, name: str, version: int) -> ModelVersion:
        """Forget a version; its files are the caller's to delete. Raises NotFound, or Conflict
        (`model-in-production`) while it is in production.
        """
        view = self.get(tenant, name, version)
        removed = (
            update(models)
            .where(
                *_named(tenant, name),
                models.c.version == version,
                models.c.stage != "production",
            )
            .values(removed_at=now())
        )
        with self._database.write() as connection:
            if connection.execute(removed).rowcount:
                return view
        if self.get(tenant, name, version).stage != "production":  # it was, a moment ago
            return self.remove(tenant, name, version)
        raise Conflict(
            f"{name}@{version} is in production; promote another version first, or move this one "
            "to the stage none",
            code="model-in-production",
        )

    def of_job(self, tenant: str, job_id: str) -> ModelVersion | None:
        """The version that the job made; None: there is none, or it was removed."""
        statement = _present(tenant, None).where(models.c.job_id == job_id)
        with self._database.read() as connection:
            row = connection.execute(statement).one_or_none()
        return None if row is None else _version(row)

    def _once_made(self, job_id: str) -> ModelVersion | None:
        with self._database.read() as connection:
            row = connection.execute(select(models).where(models.c.job_id == job_id)).one_or_none()
        return None if row is None else _version(row)


def _named(tenant: str, name: str | None) -> tuple[ColumnElement[bool], ...]:
    present = (models.c.tenant == tenant, models.c.removed_at.is_(None))
    return present if name is None else (*present, models.c.name == name)


def _present(tenant: str, name: str | None) -> Select[Any]:
    return select(models).where(*_named(tenant, name))


def _version(row: Row[Any]) -> ModelVersion:
    fields = dict(row._mapping)
    del fields["tenant"], fields["removed_at"]
    return ModelVersion(**{**fields, "meta": json.loads(fields["meta"])})


def _missing(name: str, version: int | None) -> NotFound:
    which = name if version is None else f"{name}@{version}"
    return NotFound(f"there is no model {which[:80]!r}")
