"""The client of a server's /models."""

from __future__ import annotations

import httpx
from pydantic import JsonValue

from asap_cli.answers import Model, ModelPage, parse
from asap_cli.server_client import ServerClient

__all__ = ["ModelsClient"]


class ModelsClient(ServerClient):
    """The registry of one server. Every method may raise AsapError."""

    def models(self, name: str | None, limit: int) -> ModelPage:
        """Versions by name, the newest of each first."""
        params: dict[str, str | int] = {"limit": limit}
        if name is not None:
            params["name"] = name
        request = self.http.build_request("GET", "models", params=params)
        return parse(ModelPage, self.send(request).content, self.server)

    def model(self, name: str, version: int | None) -> Model:
        """A version; without a number the one in production, else the newest."""
        path = f"models/{name}" if version is None else f"models/{name}/{version}"
        return self._model(self.http.build_request("GET", path))

    def move(self, name: str, version: int, stage: str) -> Model:
        """Put a version into a stage."""
        body: JsonValue = {"stage": stage}
        path = f"models/{name}/{version}/stage"
        return self._model(self.http.build_request("POST", path, json=body))

    def remove(self, name: str, version: int) -> None:
        """Delete a version with its files."""
        self.send(self.http.build_request("DELETE", f"models/{name}/{version}"))

    def _model(self, request: httpx.Request) -> Model:
        return parse(Model, self.send(request).content, self.server)
