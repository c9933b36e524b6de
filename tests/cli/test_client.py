"""The client against a scripted server; `test_jobs` has it against the real one."""

from __future__ import annotations

import asyncio
import json
import queue
import threading

import httpx
import pytest
from aiohttp import web

from asap.errors import (
    AsapError,
    InvalidInput,
    NotFound,
    Overloaded,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from asap_cli.client import JobsClient
from waiting import PATIENCE_S

JOB = {"id": "j", "phase": "done", "created_at": 1.0, "finished_at": 2.0, "total": 0, "counts": []}


class Script:
    """Answers in order of arrival, each a coroutine function; the last repeats."""

    def __init__(self, *answers):
        self.answers, self.requests = answers, []

    async def answer(self, request):
        answer = self.answers[min(len(self.requests), len(self.answers) - 1)]
        self.requests.append((request.path_qs, dict(request.headers), await request.read()))
        return await answer(request)


@pytest.fixture
def serve():
    """Start scripts, each on a port of its own; the value is a client of it."""
    clients, stops = [], []

    def start(script, **options):
        ports, loops = queue.SimpleQueue(), queue.SimpleQueue()

        async def listen():
            app = web.Application(client_max_size=2**30)
            app.router.add_route("*", "/{path:.*}", script.answer)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            stop = asyncio.Event()
            loops.put((asyncio.get_running_loop(), stop))
            ports.put(runner.addresses[0][1])
            await stop.wait()
            await runner.cleanup()

        thread = threading.Thread(target=lambda: asyncio.run(listen()), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{ports.get(timeout=PATIENCE_S)}/"
        stops.append((thread, *loops.get(timeout=PATIENCE_S)))
        clients.append(JobsClient(httpx.Client(base_url=url, timeout=PATIENCE_S), **options))
        return clients[-1]

    yield start
    for client in clients:
        client.__exit__()
    for thread, loop, stop in stops:
        loop.call_soon_threadsafe(stop.set)
        thread.join(PATIENCE_S)


def says(body=JOB, status=200, **headers):
    async def answer(request):
        return web.json_response(body, status=status, headers=headers)

    return answer


def streams(*chunks, cut=True, kind="text/event-stream"):
    """A body in chunks; `cut` breaks the connection before its end."""

    async def answer(request):
        response = web.StreamResponse(headers={"Content-Type": kind})
        response.enable_chunked_encoding()
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
        if cut:
            request.transport.close()
        return response

    return answer


def event(name, key, **changes):
    return f"id: {key}\nevent: {name}\ndata: {json.dumps(JOB | changes)}\n\n".encode()


def test_a_dropped_event_stream_is_taken_up_where_it_was(serve):
    script = Script(
        streams(event("progress", "one", total=1), b"id: lost\nevent: progress\nda"),
        says({"code": "upstream-unavailable", "detail": "starting"}, 503),
        streams(cut=False),
        streams(b": ping\n\n"),
        streams(event("progress", "two", total=2), event("end", "three", total=3), cut=False),
    )
    client = serve(script, attempts=3, backoff_s=0.01)
    assert [job.total for job in client.follow("j")] == [1, 2, 3]
    seen = [headers.get("Last-Event-ID") for _, headers, _ in script.requests]
    assert seen == [None, "one", "one", "one", "one"]


def test_gives_up_after_its_attempts(serve):
    script = Script(streams(event("progress", "one")), streams())
    client = serve(script, attempts=3, backoff_s=0.01)
    with pytest.raises(UpstreamUnavailable):
        list(client.follow("j"))
    assert len(script.requests) == 4


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (says({"code": "not-found", "detail": "gone"}, 404), NotFound),
        (streams(b"<html>", cut=False, kind="text/html"), UpstreamError),
        (streams(b"event: end\ndata: {}\n\n", cut=False), UpstreamError),
    ],
)
def test_what_repeating_cannot_help_is_not_repeated(serve, answer, kind):
    script = Script(answer)
    with pytest.raises(kind) as raised:
        list(serve(script, backoff_s=0.01).follow("j"))
    assert type(raised.value) is kind
    assert len(script.requests) == 1


def test_a_file_is_streamed_with_its_name_and_configuration(serve, tmp_path):
    script = Script(says(status=202))
    path = tmp_path / "näme.jsonl"
    path.write_bytes(b"{}\n" * 400_000)
    given = {"config": {"max_tokens": 3}, "priority": "background"}
    assert serve(script).submit(path, given).id == "j"
    [(where, headers, body)] = script.requests
    assert where == "/jobs/upload"
    assert headers["Content-Type"].startswith("multipart/form-data")
    assert json.dumps(given).encode() in body
    assert path.read_bytes() in body


def test_a_file_is_sent_again_under_the_same_key(serve, tmp_path):
    async def drop(request):
        request.transport.close()
        return web.Response()

    busy = {"code": "database-unavailable", "detail": "later"}
    working = {"code": "idempotency-in-progress", "detail": "being worked on"}
    script = Script(drop, says(busy, 503), says(working, 409), says(status=202))
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"{}\n")
    client = serve(script, backoff_s=0.01)
    assert client.submit(path, {}).id == "j"
    keys = [headers["Idempotency-Key"] for _, headers, _ in script.requests]
    assert len(keys) == 4
    assert len(set(keys)) == 1
    assert all(b"{}\n" in body for _, _, body in script.requests)
    client.submit(path, {})
    assert script.requests[-1][1]["Idempotency-Key"] != keys[0]


@pytest.mark.parametrize(
    ("status", "code"),
    [(422, "invalid-input"), (409, "idempotency-mismatch"), (429, "overloaded"), (500, "x")],
)
def test_a_refused_file_is_not_sent_again(serve, tmp_path, status, code):
    script = Script(says({"code": code, "detail": "no"}, status))
    (tmp_path / "in.jsonl").write_bytes(b"{}\n")
    with pytest.raises(AsapError) as raised:
        serve(script, backoff_s=0.01).submit(tmp_path / "in.jsonl", {})
    assert raised.value.problem_code == code
    assert len(script.requests) == 1


def test_where_no_server_answers_nothing_is_tried_again(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"{}\n")
    client = JobsClient(httpx.Client(base_url="http://127.0.0.1:9"), backoff_s=1000.0)
    with client, pytest.raises(UpstreamUnavailable, match="no server answers"):
        client.submit(tmp_path / "in.jsonl", {})


def test_what_is_no_parquet_is_not_kept_as_it(serve, tmp_path):
    client = serve(Script(streams(b"{}\n", cut=False)))
    with pytest.raises(UpstreamError, match="no Parquet"):
        client.download("j", tmp_path / "out.parquet", "record")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_download_leaves_nothing(serve, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("from before\n")
    client = serve(Script(streams(b"{}\n{}\n"), streams(b"{}\n", b"{}\n", cut=False)))
    with pytest.raises(UpstreamUnavailable, match="broke off"):
        client.download("j", out, "record")
    assert out.read_text() == "from before\n"
    assert client.download("j", out, "triple") == 2
    assert out.read_text() == "{}\n{}\n"
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(InvalidInput, match="cannot be written"):
        client.download("j", tmp_path / "none" / "out.jsonl", "record")


def test_items_are_read_page_by_page(serve):
    item = {"line": 1, "status": "failed", "problem": {"code": "c", "detail": "d"}}
    script = Script(
        says({"items": [item], "next_cursor": 7}),
        says({"items": [item | {"line": 9}], "next_cursor": None}),
    )
    assert [item.line for item in serve(script).items("j")] == [1, 9]
    assert [where for where, _, _ in script.requests] == [
        "/jobs/j/items?limit=500",
        "/jobs/j/items?limit=500&cursor=7",
    ]


def test_faults_of_the_server_are_errors_with_its_name(serve):
    async def drop(request):
        request.transport.close()
        return web.Response()

    async def stall(request):
        await asyncio.sleep(3600)
        return web.Response()

    async def garbled(request):
        return web.Response(body=b"no gzip", headers={"Content-Encoding": "gzip"})

    busy = {"code": "overloaded", "detail": "later", "retry_after_s": 30}
    client = serve(Script(drop, garbled, says([]), says(busy, 429), stall))
    with pytest.raises(UpstreamUnavailable, match=r"connection to http://127\.0\.0\.1:\d+ broke"):
        client.job("j")
    for words in ("garbled", "is the address right"):
        with pytest.raises(UpstreamError, match=words):
            client.job("j")
    with pytest.raises(Overloaded) as raised:
        client.jobs(3)
    assert raised.value.context == {"retry_after_s": 30}
    client.http.timeout = httpx.Timeout(PATIENCE_S, read=0.2)
    with pytest.raises(UpstreamTimeout, match="did not answer in time"):
        client.cancel("j")


def test_an_estimate_is_asked_for_and_no_job(serve, tmp_path):
    planned = dict.fromkeys(
        ("records", "bad_lines", "cot_tokens", "llm_calls", "prompt_tokens", "completion_tokens",
         "scored_tokens"), 7,
    )  # fmt: skip
    script = Script(says(planned | {"cost_usd": None, "tokenizer": "t", "sampled": False}))
    (tmp_path / "in.jsonl").write_bytes(b"{}\n")
    found = serve(script).estimate(tmp_path / "in.jsonl", {"config": {}})
    assert (found.records, found.cost_usd, found.tokenizer) == (7, None, "t")
    assert b'{"config": {}, "dry_run": true}' in script.requests[0][2]


def test_a_new_target_is_asked_for_under_one_key(serve):
    busy = {"code": "database-unavailable", "detail": "later"}
    script = Script(says(busy, 503), says(status=202))
    body = {"scores_from": "old", "config": {"max_tokens": 9}}
    assert serve(script, backoff_s=0.01).start(body).id == "j"
    keys = {headers["Idempotency-Key"] for _, headers, _ in script.requests}
    assert len(keys) == 1
    assert {where for where, _, _ in script.requests} == {"/jobs"}
    assert [json.loads(sent) for _, _, sent in script.requests] == [body] * 2


def test_the_servers_name_holds_no_password_and_its_path_counts(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with JobsClient.open("http://me:secret@127.0.0.1:1/asap/") as client:
        assert client.server == "http://127.0.0.1:1/asap"
        with pytest.raises(UpstreamUnavailable, match="no server answers") as raised:
            client.delete("j")
    assert "secret" not in raised.value.detail
