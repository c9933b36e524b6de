"""The OpenAPI description: what the framework makes of the routes, with keys and examples."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from asap.errors import InvalidInput, NotFound
from asap_gateway.examples import EXAMPLES, PLACES, Example
from asap_runtime.http_problems import MEDIA_TYPE, problem
from asap_runtime.problems import problem_of

__all__ = ["describe_api"]

KEY = {
    "type": "http",
    "scheme": "bearer",
    "description": "An API key of `asap keys create`; a server without keys asks for none.",
}


def describe_api(app: FastAPI) -> None:
    """Complete the description of the application; its routes are all there."""
    described = app.openapi()
    described["components"]["securitySchemes"] = {"ApiKey": KEY}
    described["security"] = [{"ApiKey": []}, {}]
    for example in EXAMPLES:
        operation = described["paths"][example.path][example.method]
        if example.code is None:
            for content in operation["requestBody"]["content"].values():
                _add(content, example.name, example.body)
        else:
            response = operation["responses"][str(example.status)]
            _add(response["content"][MEDIA_TYPE], example.name, _problem(example))


def _problem(example: Example) -> dict[str, object]:
    assert example.code is not None
    title = problem_of(NotFound("") if example.status == 404 else InvalidInput("")).title
    members = problem(example.status, example.code, title, example.detail or "")
    return {**members, "instance": example.path.format(**PLACES)}


def _add(content: dict[str, Any], name: str, value: object) -> None:
    content.setdefault("examples", {})[name] = {"value": value}
