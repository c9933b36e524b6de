"""The roles put together: the settings of all of them, and the stages by name."""

from __future__ import annotations

import json
from typing import Final

from starlette.routing import Route

from asap_anchor.settings import AnchorSettings
from asap_anchor.stage import AnchorStage
from asap_gateway.settings import GatewaySettings
from asap_runtime.host import open_database
from asap_runtime.settings import load_settings, redacted
from asap_surprisal.api import score_endpoint
from asap_surprisal.settings import SurprisalSettings
from asap_surprisal.stage import SurprisalStage

__all__ = ["STAGES", "AllSettings", "effective_settings", "score_route", "upgrade_database"]


class AllSettings(AnchorSettings, SurprisalSettings, GatewaySettings):
    """The settings of all roles: in one process they are one."""


STAGES: Final[dict[str, type[AnchorStage] | type[SurprisalStage]]] = {
    "anchor": AnchorStage,
    "surprisal": SurprisalStage,
}


def score_route(stage: SurprisalStage, settings: AllSettings) -> Route:
    """POST /score over the stage's scorer."""
    endpoint = score_endpoint(lambda: stage.scorer, settings.surprisal)
    return Route("/score", endpoint, methods=["POST"])


def effective_settings() -> str:
    """The settings of this machine as JSON, secrets as stars."""
    return json.dumps(redacted(load_settings(AllSettings)), indent=2)


def upgrade_database() -> None:
    """Bring the database of the settings to the newest schema."""
    open_database(load_settings(AllSettings)).close()
