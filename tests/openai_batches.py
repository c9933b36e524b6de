"""The scripted server with files and batches, as OpenAI publishes them; `work` is its night shift.

    async with BatchServer([Reply("yes")]) as server:
        ...  # a client uploads and creates; then
        server.work()  # each request of the open batches is answered by the script

A status answers a line of the batch. A refusal of whole batches is `refuse_with`, the code of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from openai_server import Item, OpenAIServer, Reply, Request, Status, completion, error_body


@dataclass(frozen=True, slots=True)
class NoReply(Item):
    """A line with status 200 whose body is no chat completion."""


@dataclass(slots=True)
class BatchServer(OpenAIServer):
    """Files and batches in memory; a batch is `validating` until `work` or `expire`."""

    files: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of every call that is no chat."""
    refuse_with: str | None = None
    room: int | None = None
    """Requests that may wait at once; a batch beyond them fails, as with too many tokens."""
    broken: str | None = None
    """`METHOD PATH` that answers 500; `lost METHOD PATH` that works and then answers 500."""
    broken_status: int = 500

    def work(self) -> None:
        """Answer all requests of the open batches."""
        waiting = 0
        for batch in self._open():
            requests = self.lines(batch)
            too_many = self.room is not None and waiting + len(requests) > self.room
            refusal = self.refuse_with or ("token_limit_exceeded" if too_many else None)
            if refusal is not None:
                batch["status"] = "failed"
                batch["errors"] = {"object": "list", "data": [{"code": refusal}]}
                continue
            waiting += len(requests)
            self._end(batch, "completed", [self._line(line) for line in requests])

    def expire(self, answered: int) -> None:
        """The day is over: so many requests of each batch were answered, the others were not."""
        for batch in self._open():
            requests = self.lines(batch)
            late = {"response": None, "error": {"code": "batch_expired", "message": "late"}}
            outcomes = [self._line(line) for line in requests[:answered]]
            outcomes += [{"custom_id": line["custom_id"], **late} for line in requests[answered:]]
            self._end(batch, "expired", outcomes)

    def paid(self) -> list[str]:
        """The prompts of all requests in batches that were made, in order."""
        lines = [line for batch in self.batches.values() for line in self.lines(batch)]
        return [line["body"]["messages"][-1]["content"] for line in lines]

    def _open(self) -> list[dict[str, Any]]:
        return [batch for batch in self.batches.values() if batch["status"] == "validating"]

    def lines(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """The requests of a batch."""
        content = self.files[batch["input_file_id"]]
        lines = [json.loads(line) for line in content.splitlines()]
        assert len({line["custom_id"] for line in lines}) == len(lines)
        assert {(line["method"], line["url"]) for line in lines} == {
            ("POST", "/v1/chat/completions")
        }
        return lines

    def _line(self, line: dict[str, Any]) -> dict[str, Any]:
        request = Request(line["body"], {}, 0.0)
        item = self._item(request)
        if isinstance(item, Reply):
            status, body = 200, completion(request, item)
        elif isinstance(item, NoReply):
            status, body = 200, {"object": "error"}
        else:
            assert isinstance(item, Status)
            status, body = item.status, error_body(request, item)
        response = {"status_code": status, "request_id": "r", "body": body}
        return {"custom_id": line["custom_id"], "response": response, "error": None}

    def _end(self, batch: dict[str, Any], status: str, outcomes: list[dict[str, Any]]) -> None:
        """Answers go into one file, the rest into another, in any order."""
        good = [o for o in outcomes if o["response"] and o["response"]["status_code"] == 200]
        bad = [o for o in outcomes if o not in good]
        for name, lines in (("output_file_id", good), ("error_file_id", bad)):
            if lines:
                batch[name] = self._keep("\n".join(map(json.dumps, lines[::-1])).encode())
        batch["status"] = status

    def _keep(self, content: bytes) -> str:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        return name

    def _route(self, app: web.Application) -> None:
        OpenAIServer._route(self, app)
        app.middlewares.append(self._watch())
        app.router.add_post("/v1/files", self._upload)
        app.router.add_get("/v1/files/{id}/content", self._download)
        app.router.add_post("/v1/batches", self._create)
        app.router.add_get("/v1/batches", self._list)
        app.router.add_get("/v1/batches/{id}", self._retrieve)

    def _watch(self) -> Any:
        @web.middleware
        async def watch(http: web.Request, handler: Any) -> web.StreamResponse:
            call = f"{http.method} {http.path.removeprefix('/v1')}"
            self.asked.append((http.method, http.path))
            if self.broken == call:
                return web.json_response({}, status=self.broken_status)
            response: web.StreamResponse = await handler(http)
            return web.json_response({}, status=500) if self.broken == f"lost {call}" else response

        return watch

    async def _upload(self, http: web.Request) -> web.Response:
        form = await http.post()
        assert form["purpose"] == "batch"
        file = form["file"]
        assert isinstance(file, web.FileField)
        name = self._keep(file.file.read())
        return web.json_response({"id": name, "object": "file", "purpose": "batch"})

    async def _download(self, http: web.Request) -> web.Response:
        return web.Response(body=self.files[http.match_info["id"]])

    async def _create(self, http: web.Request) -> web.Response:
        order = await http.json()
        assert order["endpoint"] == "/v1/chat/completions"
        assert order["completion_window"] == "24h"
        assert order["input_file_id"] in self.files
        batch = {
            "id": f"batch-{len(self.batches)}",
            "object": "batch",
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "errors": None,
            **order,
        }
        self.batches[batch["id"]] = batch
        return web.json_response(batch)

    async def _list(self, http: web.Request) -> web.Response:
        newest = list(self.batches.values())[::-1][: int(http.query["limit"])]
        return web.json_response({"object": "list", "data": newest, "has_more": False})

    async def _retrieve(self, http: web.Request) -> web.Response:
        batch = self.batches.get(http.match_info["id"])
        return web.json_response(batch or {}, status=200 if batch else 404)
