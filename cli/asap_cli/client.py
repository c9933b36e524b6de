"""The client of a server's /jobs: files go up and down in streams, progress comes as events.

It knows HTTP and no terminal.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import httpx
from pydantic import BaseModel, JsonValue
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from asap.errors import (
    InvalidInput,
    NotFound,
    UpstreamError,
    UpstreamUnavailable,
)
from asap_cli.answers import (
    Estimate,
    Item,
    ItemPage,
    Job,
    JobPage,
    Plan,
    parse,
)
from asap_cli.server_client import ServerClient
from asap_cli.sse import parse_events
from asap_runtime.layouts import Layout

__all__ = ["JobsClient"]

ITEMS_PER_PAGE = 500
LONGEST_PAUSE_S = 15.0
A = TypeVar("A", bound=BaseModel)


class JobsClient(ServerClient):
    """The jobs of one server, over the given HTTP client. Every method may raise AsapError.

    Args:
        http: its base URL is the server's.
        upload_timeout_s: longest wait for the answer to an upload, which comes when the server has
            stored the whole file.
        attempts: connections in a row that one call makes before it gives up, where it tries again.
        backoff_s: first pause between them; it doubles.
    """

    def __init__(
        self,
        http: httpx.Client,
        *,
        upload_timeout_s: float = 1800.0,
        attempts: int = 10,
        backoff_s: float = 0.5,
    ) -> None:
        super().__init__(http)
        self._backoff_s = backoff_s
        self._upload_timeout = httpx.Timeout(**{**http.timeout.as_dict(), "read": upload_timeout_s})
        self._retrying = Retrying(
            stop=stop_after_attempt(attempts),
            wait=wait_exponential(multiplier=backoff_s, max=LONGEST_PAUSE_S),
            retry=retry_if_exception(lambda error: getattr(error, "retryable", False)),
            reraise=True,
        )

    def submit(self, path: Path, options: Mapping[str, JsonValue]) -> Job:
        """A new job of the file's lines. What `options` leave out, the server decides.

        Safe against a connection that breaks off: the file is sent again, and the server makes one
        job of it, however often it has heard it.
        """
        given = json.dumps(dict(options))
        return self._sent_once(lambda key: self._upload(Job, path, given, key))

    def estimate(self, path: Path, options: Mapping[str, JsonValue]) -> Estimate:
        """What a job of the file's lines would take. The server keeps nothing of it."""
        given = json.dumps({**options, "dry_run": True})
        return self._sent_once(lambda key: self._upload(Estimate, path, given, key))

    def start(self, body: Mapping[str, JsonValue]) -> Job:
        """A new job of any kind that needs no file; safe as `submit` is."""
        return self._sent_once(lambda key: self._post(Job, body, key))

    def plan(self, body: Mapping[str, JsonValue]) -> Plan:
        """What the job of `start` would take, as its kind says it. The server keeps nothing."""
        return self._sent_once(lambda key: self._post(Plan, {**body, "dry_run": True}, key))

    def _sent_once(self, send: Callable[[str], A]) -> A:
        """The answer to a request that is repeated, if it must be, under one key."""
        retrying = self._retrying.copy(retry=retry_if_exception(_is_passing))
        return retrying(send, uuid4().hex)

    def _post(self, kind: type[A], body: Mapping[str, JsonValue], key: str) -> A:
        headers = {"Idempotency-Key": key}
        request = self.http.build_request("POST", "jobs", json=dict(body), headers=headers)
        return parse(kind, self.send(request).content, self.server)

    def _upload(self, kind: type[A], path: Path, options: str, key: str) -> A:
        try:
            stream = path.open("rb")
        except OSError as error:
            raise NotFound(f"{str(path)!r} cannot be read: {error.strerror}") from error
        with stream:
            request = self.http.build_request(
                "POST",
                "jobs/upload",
                data={"options": options},
                files={"file": (path.name, stream)},
                headers={"Idempotency-Key": key},
                timeout=self._upload_timeout,
            )
            return parse(kind, self.send(request).content, self.server)

    def job(self, job_id: str) -> Job:
        """The job. Raises NotFound."""
        return self._job("GET", _path(job_id))

    def jobs(self, limit: int) -> JobPage:
        """The newest jobs."""
        request = self.http.build_request("GET", "jobs", params={"limit": limit})
        return parse(JobPage, self.send(request).content, self.server)

    def items(self, job_id: str) -> Iterator[Item]:
        """All items in input order, read a page at a time."""
        params = {"limit": ITEMS_PER_PAGE}
        while True:
            request = self.http.build_request("GET", _path(job_id, "/items"), params=params)
            page = parse(ItemPage, self.send(request).content, self.server)
            yield from page.items
            if page.next_cursor is None:
                return
            params["cursor"] = page.next_cursor

    def report(self, job_id: str, format: str, *, partial: bool = False) -> str:
        """What an evaluation came to, as json or markdown."""
        params = {"format": format, "partial": "true" if partial else "false"}
        request = self.http.build_request("GET", _path(job_id, "/report"), params=params)
        return self.send(request).text

    def lines(self, job_id: str) -> Iterator[str]:
        """What the finished items hold, one line of JSON each, in input order."""
        request = self.http.build_request("GET", _path(job_id, "/result"))
        with self.translated(), closing(self.open_answer(request)) as response:
            yield from response.iter_lines()

    def cancel(self, job_id: str) -> Job:
        """Stop the job; safe to repeat."""
        return self._job("POST", _path(job_id, "/cancel"))

    def retry(self, job_id: str) -> Job:
        """Run the failed items of a finished job again; other jobs stay as they are."""
        return self._job("POST", _path(job_id, "/retry"))

    def delete(self, job_id: str) -> None:
        """Delete the job with its results."""
        self.send(self.http.build_request("DELETE", _path(job_id)))

    def download(self, job_id: str, out: Path, layout: Layout) -> int:
        """Write the finished records to `out`, which appears whole or not at all; how many.

        As Parquet when its name ends so, else as JSON lines.
        """
        part = out.with_name(f".{out.name}.part")
        format = "parquet" if out.name.lower().endswith(".parquet") else "jsonl"
        params = {"layout": layout, "format": format}
        request = self.http.build_request("GET", _path(job_id, "/result"), params=params)
        try:
            with (
                self.translated(),
                closing(self.open_answer(request)) as response,
                part.open("wb") as stream,
            ):
                for chunk in response.iter_bytes():
                    stream.write(chunk)
            records = self._count(part, format)
            part.replace(out)
        except OSError as error:
            raise InvalidInput(f"{str(out)!r} cannot be written: {error.strerror}") from error
        finally:
            part.unlink(missing_ok=True)
        return records

    def _count(self, path: Path, format: str) -> int:
        if format == "jsonl":
            with path.open("rb") as stream:
                return sum(1 for _ in stream)
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return int(pq.read_metadata(path).num_rows)
        except pa.ArrowException as error:
            raise UpstreamError(f"what {self.server} sends is no Parquet file") from error

    def follow(self, job_id: str) -> Iterator[Job]:
        """The job whenever it changes, until it has ended; its last state comes last.

        A dropped connection is taken up where it was. Each that brought anything, be it a sign of
        life, gives the next one all its attempts.
        """
        seen: str | None = None
        while True:
            response, chunks = self._retrying(self._open_events, job_id, seen)
            with closing(response):
                try:
                    for event in parse_events(chunks):
                        seen = event.id or seen
                        if event.name in ("progress", "end"):
                            yield parse(Job, event.data, self.server)
                        if event.name == "end":
                            return
                except httpx.RequestError:
                    pass
            time.sleep(self._backoff_s)

    def _open_events(self, job_id: str, seen: str | None) -> tuple[httpx.Response, Iterator[bytes]]:
        """An event stream whose first bytes have come."""
        headers = [(b"Accept", b"text/event-stream")]
        if seen is not None:
            headers.append((b"Last-Event-ID", seen.encode()))
        request = self.http.build_request("GET", _path(job_id, "/events"), headers=headers)
        response = self.open_answer(request)
        try:
            if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
                raise UpstreamError(f"{self.server} sends no events; is the address right?")
            chunks = response.iter_bytes()
            with self.translated():
                first = next(chunks, None)
            if first is None:
                raise UpstreamUnavailable(f"{self.server} closes the connection without a word")
        except BaseException:
            response.close()
            raise
        return response, chain([first], chunks)

    def _job(self, method: str, path: str) -> Job:
        answer = self.send(self.http.build_request(method, path))
        return parse(Job, answer.content, self.server)


def _is_passing(error: BaseException) -> bool:
    """Sending the same again may help: the connection broke off, the server was busy with itself
    or with the first sending. Not so when no server answers at all.
    """
    if getattr(error, "problem_code", "") == "idempotency-in-progress":
        return True
    no_server = isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout)
    return isinstance(error, UpstreamUnavailable) and not no_server


def _path(job_id: str, below: str = "") -> str:
    """The job's path. What cannot be an id is no path to elsewhere."""
    if not (job_id.isascii() and job_id.replace("-", "").replace("_", "").isalnum()):
        raise NotFound(f"there is no job {job_id[:64]!r}")
    return f"jobs/{job_id}{below}"
