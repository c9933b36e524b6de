"""Files and data sets as jobs; what is refused leaves nothing behind."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from asap_gateway.settings import GatewayLimits
from waiting import PATIENCE_S, until

TRIPLE = {"question": "q", "cot": "first step\n\nsecond\n\nthe third step", "answer": "a step"}
CONFIG = {"max_tokens": 4}
ENDED = ("done", "cancelled", "rejected")
BOMB = gzip.compress(b" " * 70_000_000)


def numbered(count, **fields):
    return [{**TRIPLE, "id": str(i), **fields} for i in range(count)]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows):
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


async def upload(client, data, name="in.jsonl", options=None, key=None):
    return await client.post(
        "/jobs/upload",
        files={"file": (name, data)},
        data={} if options is None else {"options": json.dumps(options)},
        headers={} if key is None else {"Idempotency-Key": key},
    )


async def ended(client, answer):
    assert answer.status_code == 202, answer.text
    job = answer.json()["id"]
    async with asyncio.timeout(PATIENCE_S):
        while True:
            state = (await client.get(f"/jobs/{job}")).json()
            if state["phase"] in ENDED:
                return state
            await asyncio.sleep(0.02)


def blobs(client):
    return [blob.key for blob in client.app.state.gateway.submissions.blobs.uploads()]


async def no_file_is_left(client):
    """A file goes when its job has been taken in or rejected, a moment later."""
    await until(lambda: blobs(client) == [])


@contextmanager
def nothing_taken_in(client):
    """While the block runs, a new job waits."""
    ingester = client.app.state.gateway.submissions.ingester
    ingester.__exit__(None, None, None)
    try:
        yield
    finally:
        ingester.__enter__()


async def nothing_is_left(client):
    return (await client.get("/jobs")).json()["jobs"] == [] and blobs(client) == []


@pytest.mark.parametrize(
    ("name", "encode"),
    [
        ("in.jsonl", jsonl),
        ("../../IN.NDJSON", jsonl),
        ("in.jsonl.gz", lambda rows: gzip.compress(jsonl(rows))),
        ("in.parquet", parquet),
    ],
)
async def test_a_file_is_a_job_and_is_gone_when_its_lines_are_in(client, name, encode):
    with nothing_taken_in(client):
        answer = await upload(client, encode(numbered(30)), name, {"config": CONFIG})
    assert answer.json()["phase"] == "validating"
    assert answer.headers["Location"] == f"/jobs/{answer.json()['id']}"
    state = await ended(client, answer)
    assert (state["phase"], state["total"]) == ("done", 30)
    assert state["config"]["max_tokens"] == 4
    result = await client.get(f"/jobs/{state['id']}/result")
    assert [json.loads(line)["id"] for line in result.text.splitlines()] == [
        str(i) for i in range(30)
    ]
    await no_file_is_left(client)


async def test_bad_lines_are_failed_items(client):
    lines = [json.dumps(triple) for triple in numbered(30)]
    lines[1:1] = ["{broken", "", json.dumps({**TRIPLE, "cot": "<think>"})]
    data = "\n".join(lines).encode()
    state = await ended(client, await upload(client, data, options={"config": CONFIG}))
    assert (state["phase"], state["total"]) == ("done", 32)
    items = (await client.get(f"/jobs/{state['id']}/items?status=failed")).json()["items"]
    assert {item["line"]: item["problem"]["code"] for item in items} == {
        2: "malformed-json",
        4: "control-token-in-text",
    }


async def test_a_file_with_too_many_bad_lines_is_rejected_with_the_first_hundred(client):
    data = jsonl(numbered(40)) + b"{broken\n" * 120
    state = await ended(client, await upload(client, data))
    assert state["phase"] == "rejected"
    first, *lines = state["problems"]
    assert first["detail"].startswith("120 of the first 160 lines cannot be used; at most 10%")
    assert len(lines) == 99
    assert lines[0]["code"] == "malformed-json"
    assert lines[0]["detail"].startswith("line 41: ")
    await no_file_is_left(client)


async def test_a_file_with_too_many_lines_is_rejected(client):
    answer = await upload(client, jsonl(numbered(1001)), options={"config": {"method": "original"}})
    state = await ended(client, answer)
    assert (state["phase"], state["problems"][0]["code"]) == ("rejected", "too-many-items")


@pytest.mark.parametrize(
    ("name", "data", "options", "status", "code"),
    [
        ("in.txt", b"x", "{}", 415, "unsupported-media-type"),
        ("in.jsonl", b'{"text": 1}\n', "{}", 422, "invalid-input"),
        ("in.jsonl", b"", "{}", 422, "invalid-input"),
        ("in.parquet", b"no parquet", "{}", 422, "invalid-input"),
        ("in.jsonl.gz", b"no gzip", "{}", 422, "invalid-input"),
        ("in.jsonl.gz", BOMB, "{}", 413, "decompression-limit"),
        ("in.jsonl", b"{}\n" * 700_000, "{}", 413, "payload-too-large"),
        ("../../in.jsonl", b"", "{}", 422, "invalid-input"),
        ("in.jsonl", jsonl(numbered(1)), "[1]", 422, "invalid-input"),
        ("in.jsonl", jsonl(numbered(1)), "{", 400, "malformed-json"),
        ("in.jsonl", jsonl(numbered(1)), "[" * 65 + "]" * 65, 400, "malformed-json"),
        (
            "in.jsonl",
            jsonl(numbered(1)),
            '{"dry_run": false, "dry_run": false}',
            422,
            "invalid-input",
        ),
        ("in.jsonl", jsonl(numbered(1)), '{"tau": 7}', 422, "invalid-input"),
        ("in.jsonl", jsonl(numbered(1)), '{"config": {"tau": 7}}', 422, "invalid-input"),
        ("in.jsonl", jsonl(numbered(1)), '{"config": {"method": "x"}}', 422, "unknown-method"),
        ("in.jsonl", jsonl(numbered(1)), f'{{"webhook": "{"x" * 10_000}"}}', 422, "invalid-input"),
    ],
)
async def test_bad_uploads_leave_nothing(client, name, data, options, status, code):
    answer = await client.post(
        "/jobs/upload", files={"file": (name, data)}, data={"options": options}
    )
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert await nothing_is_left(client)


FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
LINE = json.dumps(TRIPLE).encode()
OPTIONS = (
    b'\r\n--b\r\nContent-Disposition: form-data; name="options"\r\n\r\n{"config": {"tau": 0.5}}'
)
END = b"\r\n--b--\r\n"


def send(client, body, content_type="multipart/form-data; boundary=b", **headers):
    headers = {"Content-Type": content_type, **headers}
    return client.post("/jobs/upload", content=body, headers=headers)


async def test_the_options_may_come_after_the_file(client):
    state = await ended(client, await send(client, FILE + LINE + OPTIONS + END))
    assert state["config"]["tau"] == 0.5


@pytest.mark.parametrize(
    ("body", "type_", "status"),
    [
        (FILE + LINE + END, "application/json", 415),
        (FILE + LINE + END, "multipart/form-data", 400),
        (FILE + LINE + END, f"multipart/form-data; boundary={'b' * 300}", 400),
        (b"no form at all", "multipart/form-data; boundary=b", 400),
        (FILE + LINE, "multipart/form-data; boundary=b", 400),
        (FILE + LINE + OPTIONS, "multipart/form-data; boundary=b", 400),
        (OPTIONS[2:] + END, "multipart/form-data; boundary=b", 422),
        (FILE + LINE + b"\r\n" + FILE + LINE + END, "multipart/form-data; boundary=b", 422),
        (FILE.replace(b"file\"", b"cot\"", 1) + LINE + END, "multipart/form-data; boundary=b", 422),
        (FILE.replace(b'"in', b'"' + b"x" * 2000) + END, "multipart/form-data; boundary=b", 400),
        (b"--b\r\n" + b"A: b\r\n" * 9 + b"\r\n" + END, "multipart/form-data; boundary=b", 400),
        (b"", "multipart/form-data; boundary=b", 400),
    ],
)  # fmt: skip
async def test_a_broken_form_leaves_nothing(client, body, type_, status):
    answer = await send(client, body, type_)
    assert answer.status_code == status, answer.text
    assert await nothing_is_left(client)


async def test_a_compressed_body_is_not_taken(client):
    encoding = {"Content-Encoding": "gzip"}
    answer = await send(client, gzip.compress(FILE + LINE + END), **encoding)
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported-media-type")


async def test_an_upload_that_ends_half_way_leaves_nothing(client):
    sent = []
    body = FILE + LINE * 15_000  # more than is held back before it is written
    messages = iter(
        [
            {"type": "http.request", "body": body, "more_body": True},
            {"type": "http.disconnect"},
        ]
    )
    during = []

    async def receive():
        message = next(messages)
        if message["type"] == "http.disconnect":
            during.extend(blobs(client))
        return message

    async def send_(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/jobs/upload",
        "raw_path": b"/jobs/upload",
        "query_string": b"",
        "headers": [(b"content-type", b"multipart/form-data; boundary=b")],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("127.0.0.1", 1),
        "root_path": "",
    }
    await client.app(scope, receive, send_)
    assert len(during) == 1, "it was being written"
    assert await nothing_is_left(client)


async def test_a_repeated_upload_hears_the_first_answer(client):
    data = jsonl(numbered(2))
    first = await upload(client, data, key="k", options={"config": CONFIG})
    again = await upload(client, data, "other name.jsonl", key="k", options={"config": CONFIG})
    assert (again.status_code, again.content) == (202, first.content)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.headers["Location"] == first.headers["Location"]
    await ended(client, first)
    assert len((await client.get("/jobs")).json()["jobs"]) == 1
    await no_file_is_left(client)
    for other in (upload(client, data, key="k"), upload(client, data + data, key="k")):
        answer = await other
        assert (answer.status_code, answer.json()["code"]) == (409, "idempotency-mismatch")
    assert blobs(client) == []


async def test_a_refused_upload_leaves_the_key_free(client):
    assert (await upload(client, b"{}", key="k")).status_code == 422
    assert (await upload(client, jsonl(numbered(1)), key="k")).status_code == 202
    assert (await upload(client, jsonl(numbered(1)), key="k" * 256)).status_code == 422


async def test_a_full_disk_is_told_before_the_file_is_read(client):
    client.app.state.gateway.submissions.blobs._min_free_share = 1.0
    answer = await upload(client, jsonl(numbered(1)))
    assert (answer.status_code, answer.json()["code"]) == (507, "insufficient-storage")
    assert await nothing_is_left(client)


@pytest.fixture
def dataset(client, tmp_path):
    """A data set of the tenant in the blob store, and its address."""
    path = tmp_path / "blobs" / "local" / "sets" / "in.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(jsonl(numbered(5)))
    return path, f"file://{path}"


async def test_a_data_set_is_a_job_and_stays(client, dataset):
    path, uri = dataset
    with nothing_taken_in(client):
        answer = await client.post("/jobs", json={"dataset": uri, "config": CONFIG})
    assert answer.json()["phase"] == "validating"
    state = await ended(client, answer)
    assert (state["phase"], state["total"]) == ("done", 5)
    assert path.exists()


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        (lambda uri: uri.replace("in.jsonl", "none.jsonl"), 404, "not-found"),
        (lambda uri: uri.replace("/local/", "/other/"), 404, "not-found"),
        (lambda uri: uri.replace("file:", "http:"), 422, "invalid-input"),
        (lambda uri: uri.replace("sets", "sets/../../other"), 422, "invalid-input"),
        (lambda uri: "file:///etc/passwd", 422, "invalid-input"),
        (lambda uri: uri.replace("in.jsonl", ""), 422, "invalid-input"),
    ],
)
async def test_a_data_set_elsewhere_is_refused(client, dataset, change, status, code):
    answer = await client.post("/jobs", json={"dataset": change(dataset[1])})
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    if status == 422:
        assert answer.json()["errors"][0]["pointer"] == "/dataset"
    assert (await client.get("/jobs")).json()["jobs"] == []


async def test_a_data_set_needs_a_known_ending(client, dataset):
    dataset[0].rename(dataset[0].with_suffix(".csv"))
    answer = await client.post("/jobs", json={"dataset": dataset[1].replace(".jsonl", ".csv")})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/dataset"


def test_the_defaults_are_the_documented_limits():
    limits = GatewayLimits().intake()
    assert (limits.max_items, limits.max_bad_lines, limits.max_bad_share) == (10**6, 10**4, 0.1)
    assert limits.read.line_bytes == 4 * 2**20
    assert (limits.read.expanded_ratio, limits.read.expanded_bytes) == (20, 4 * 2**30)
