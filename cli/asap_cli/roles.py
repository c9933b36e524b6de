"""The roles put together: the settings of all of them, and the stages by name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import Engine
from starlette.routing import Route

from asap.errors import UpstreamUnavailable
from asap_anchor.settings import AnchorSettings
from asap_anchor.stage import AnchorStage
from asap_evaluator.settings import EvaluatorSettings
from asap_evaluator.stage import GenerateStage, GradeStage
from asap_gateway.settings import GatewaySettings
from asap_runtime.blobs import open_blobs
from asap_runtime.database import Database, open_engine
from asap_runtime.host import open_database
from asap_runtime.migrate import has_schema
from asap_runtime.models import ModelRegistry
from asap_runtime.settings import load_settings, redacted
from asap_runtime.stage import Stage
from asap_surprisal.api import score_endpoint
from asap_surprisal.settings import SurprisalSettings
from asap_surprisal.stage import SurprisalStage
from asap_trainer.settings import TrainerSettings
from asap_trainer.stage import TrainStage

__all__ = [
    "STAGES",
    "AllSettings",
    "effective_settings",
    "open_stage",
    "score_route",
    "upgrade_database",
    "wait_for_schema",
]

LOOK_S = 1.0


class AllSettings(
    AnchorSettings, SurprisalSettings, TrainerSettings, EvaluatorSettings, GatewaySettings
):
    """The settings of all roles: in one process they are one."""


def open_stage(name: str, settings: AllSettings, database: Database) -> Stage[Any]:
    """The stage of that name, one of STAGES, not started."""
    return _STAGES[name](settings, database)


def _trainer(settings: AllSettings, database: Database) -> TrainStage:
    return TrainStage(settings, blobs=open_blobs(settings), registry=ModelRegistry(database))


_STAGES: Final[dict[str, Callable[[AllSettings, Database], Stage[Any]]]] = {
    "anchor": lambda settings, _: AnchorStage(settings),
    "surprisal": lambda settings, _: SurprisalStage(settings),
    "trainer": _trainer,
    "generate": lambda settings, _: GenerateStage(settings, blobs=open_blobs(settings)),
    "grade": lambda settings, _: GradeStage(settings, blobs=open_blobs(settings)),
}
STAGES: Final = tuple(_STAGES)


def score_route(stage: SurprisalStage, settings: AllSettings) -> Route:
    """POST /score over the stage's scorer."""
    endpoint = score_endpoint(lambda: stage.scorer, settings.surprisal)
    return Route("/score", endpoint, methods=["POST"])


def effective_settings() -> str:
    """The settings of this machine as JSON, secrets as stars."""
    return json.dumps(redacted(load_settings(AllSettings)), indent=2)


def upgrade_database() -> None:
    """Bring the database of the settings to the newest schema."""
    open_database(load_settings(AllSettings), migrate=True).close()


def wait_for_schema(timeout_s: float) -> None:
    """Return when the database is there and has the schema that this release needs.

    Raises UpstreamUnavailable (`database-unavailable`) when it has not within `timeout_s`.
    """
    engine = open_engine(load_settings(AllSettings).database_url, pool_size=1)
    end = time.monotonic() + timeout_s
    try:
        while not _has_schema(engine):
            if time.monotonic() > end:
                raise UpstreamUnavailable(
                    f"the database has not the schema of this release after {timeout_s:.0f} s; "
                    "`asap db upgrade` makes it",
                    code="database-unavailable",
                )
            time.sleep(LOOK_S)
    finally:
        engine.dispose()


def _has_schema(engine: Engine) -> bool:
    try:
        return has_schema(engine)
    except UpstreamUnavailable:  # it is still being started
        return False
