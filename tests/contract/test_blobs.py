"""The blob store, in a folder and in a bucket of a real S3 server."""

from __future__ import annotations

import errno
import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass

import fsspec
import pytest
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

from asap.errors import AsapError, InvalidInput, Misconfigured, NotFound, StorageFull
from asap_runtime.blobs import BlobStore, open_blobs
from asap_runtime.settings import RuntimeSettings
from waiting import free_port

MIB = 2**20
KEYS = {"access_key": "key", "secret_key": "secret", "region": "eu-central-1"}


@pytest.fixture(scope="session")
def s3_server():
    port = free_port()
    server = ThreadedMotoServer("127.0.0.1", port)
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@dataclass(frozen=True)
class Opened:
    """A store, its address, and its files as they lie."""

    store: BlobStore
    url: str
    files: object

    def put(self, key, data):
        path = f"{self.url.partition('://')[2]}/{key}"
        self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        self.files.pipe_file(path, data)

    def all(self):
        root = self.url.partition("://")[2]
        return sorted(path.partition(root)[2].strip("/") for path in self.files.find(root))


@pytest.fixture
def folder(tmp_path):
    url = f"file://{tmp_path / 'blobs'}"
    settings = RuntimeSettings(home=tmp_path, blobs={"url": url})
    return Opened(open_blobs(settings), url, fsspec.filesystem("file"))


@pytest.fixture
def bucket(s3_server, tmp_path):
    files = fsspec.filesystem(
        "s3",
        key="key",
        secret="secret",
        client_kwargs={"endpoint_url": s3_server, "region_name": "eu-central-1"},
        use_listings_cache=False,
    )
    name = f"bucket-{tmp_path.name.replace('_', '-')[-40:]}".lower()
    files.mkdir(name)
    url = f"s3://{name}/deep/prefix"
    settings = RuntimeSettings(home=tmp_path, blobs={"url": url, "endpoint_url": s3_server, **KEYS})
    yield Opened(open_blobs(settings), url, files)
    files.rm(name, recursive=True)


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.contract)])
def opened(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def store(opened):
    return opened.store


def put(store, data=b"some bytes", tenant="a"):
    key = store.upload_key(tenant, ".jsonl")
    with store.create(key) as writer:
        writer.write(data)
    return key


@pytest.mark.parametrize("size", [0, 10, 20 * MIB + 7], ids=["empty", "small", "in parts"])
def test_what_goes_in_comes_out(store, size):
    data = os.urandom(size)
    key = store.upload_key("a", ".jsonl.gz")
    with store.create(key) as writer:
        for start in range(0, size, MIB):
            writer.write(data[start : start + MIB])
    assert (writer.size, writer.sha256) == (size, hashlib.sha256(data).hexdigest())
    assert store.size(key) == size
    with store.open(key) as stream:
        assert stream.read() == data
    with store.local(key) as path:
        assert path.read_bytes() == data
    assert key.startswith("a/uploads/")
    assert key.endswith(".jsonl.gz")


def test_lines_are_read_without_the_whole(store):
    key = put(store, b"one\ntwo" + b"x" * 3 * MIB + b"\nthree")
    with store.open(key) as stream:
        assert stream.readline() == b"one\n"
        assert len(stream.readline(100)) == 100
        stream.readline()
        assert stream.readline() == b"three"
        assert stream.readline() == b""


@pytest.mark.parametrize("size", [10, 20 * MIB], ids=["small", "in parts"])
def test_an_interrupted_blob_leaves_nothing(opened, size):
    key = opened.store.upload_key("a", ".jsonl")
    with suppress(RuntimeError), opened.store.create(key) as writer:
        writer.write(b"x" * size)
        raise RuntimeError
    assert opened.all() == []
    if hasattr(opened.files, "list_multipart_uploads"):
        assert opened.files.list_multipart_uploads(opened.url.split("/")[2]) == []
    with pytest.raises(NotFound):
        opened.store.open(key)


def test_a_blob_is_not_there_before_it_is_whole(opened):
    key = opened.store.upload_key("a", ".jsonl")
    with opened.store.create(key) as writer:
        writer.write(b"x" * 10)
        with pytest.raises(NotFound):
            opened.store.size(key)
    assert opened.all() == [key]


def test_deleting_is_idempotent_and_by_tenant(opened):
    store = opened.store
    key, *_ = [put(store), put(store), put(store, tenant="ab")]
    opened.put("a/sets/x.jsonl", b"x")
    for _ in range(2):
        store.delete(key)
    assert len(opened.all()) == 3
    for _ in range(2):
        store.delete_all("a")
    assert [name.partition("/")[0] for name in opened.all()] == ["ab"]
    for missing in (store.size, store.open, lambda key: store.local(key).__enter__()):
        with pytest.raises(NotFound):
            missing(key)


def test_uploads_are_listed_with_their_age_and_data_sets_are_not(opened):
    assert list(opened.store.uploads()) == []
    keys = {put(opened.store), put(opened.store, tenant="b")}
    opened.put("a/sets/x.jsonl", b"x")
    opened.put("loose.jsonl", b"x")
    found = list(opened.store.uploads())
    assert {blob.key for blob in found} == keys
    assert all(-5 < blob.age_s < 60 for blob in found)


@pytest.mark.parametrize("tenant", ["", ".", "..", "a/b", "a\0", "a\\b", "%2e%2e"])
def test_a_tenant_is_one_plain_name(store, tenant):
    for use in (lambda: store.upload_key(tenant, ".jsonl"), lambda: store.delete_all(tenant)):
        with pytest.raises(InvalidInput):
            use()


def test_a_data_set_is_named_by_its_address(opened):
    opened.put("a/sets/x.jsonl", b"x")
    opened.put("a/y é @ +.jsonl", b"x")
    scheme = opened.url.partition("://")[0]
    for key in ("a/sets/x.jsonl", "a/y é @ +.jsonl"):
        uri = f"{opened.url}/{key}"
        assert opened.store.resolve(uri, "a") == key
        assert opened.store.resolve(uri.replace(scheme, scheme.upper(), 1), "a") == key


FOREIGN = [
    "http://127.0.0.1/a/x.jsonl",
    "https://{root}/a/x.jsonl",
    "ftp://{root}/a/x.jsonl",
    "gopher:{root}/a/x.jsonl",
    "file:{root}/a/x.jsonl",
    "file:/etc/passwd",
    "file:///etc/passwd",
    "file://localhost/etc/passwd",
    "file://localhost{root}/a/x.jsonl",
    "s3://other/a/x.jsonl",
    "s3://other@{root}/a/x.jsonl",
    "{url}/../a/x.jsonl",
    "{url}/a/../b/x.jsonl",
    "{url}/a/../a/x.jsonl",
    "{url}/a/./x.jsonl",
    "{url}/b/../../a/x.jsonl",
    "{url}/a/%2e%2e/b/x.jsonl",
    "{url}/a/%2E%2E/b/x.jsonl",
    "{url}/a/%252e%252e/b/x.jsonl",
    "{url}/a%2fx.jsonl",
    "{url}/a/..%2fb/x.jsonl",
    "{url}/a/..\\b\\x.jsonl",
    "{url}\\a\\x.jsonl",
    "{url}/a//x.jsonl",
    "{url}//a/x.jsonl",
    "{url}/a/x.jsonl/",
    "{url}/a/x.jsonl?versionId=1",
    "{url}/a/x.jsonl#part",
    "{url}/a/x.jsonl\0",
    "{url}/a/x.jsonl\n",
    "{url}/a/\x7f.jsonl",
    "{url}x/a/x.jsonl",
    "{url}/",
    "{up}/a/x.jsonl",
    "{up}",
    "a/x.jsonl",
    "/a/x.jsonl",
    "../a/x.jsonl",
    "~/x.jsonl",
    "://a/x.jsonl",
    "",
]


@pytest.mark.parametrize("form", FOREIGN)
def test_no_address_leads_elsewhere(opened, form):
    opened.put("a/x.jsonl", b"x")
    opened.put("b/x.jsonl", b"x")
    root = opened.url.partition("://")[2]
    uri = form.format(url=opened.url, root=root, up=opened.url.rpartition("/")[0])
    with pytest.raises(InvalidInput) as caught:
        opened.store.resolve(uri, "a")
    assert caught.value.context["errors"][0]["pointer"] == "/dataset"


def test_what_is_another_tenants_is_said_to_be_missing(opened):
    upload = put(opened.store)
    for key in ("b/x.jsonl", "ab/x.jsonl", "a/folder/x.jsonl"):
        opened.put(key, b"x")
    told = set()
    for key in ("b/x.jsonl", "ab/x.jsonl", "a", "b", "a/none.jsonl", "a/folder", "A/x", upload):
        with pytest.raises(NotFound) as caught:
            opened.store.resolve(f"{opened.url}/{key}", "a")
        told.add(caught.value.detail)
    assert len(told) == 1


def test_links_lead_nowhere_else(folder, tmp_path):
    folder.put("a/x.jsonl", b"x")
    folder.put("b/x.jsonl", b"x")
    own, root = tmp_path / "blobs" / "a", tmp_path / "blobs"
    (tmp_path / "secret.jsonl").write_bytes(b"x")
    (own / "out.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (own / "dir").symlink_to(tmp_path)
    (own / "b").symlink_to(root / "b")
    (own / "loop").symlink_to(own / "loop")
    (own / "again.jsonl").symlink_to(own / "x.jsonl")
    for name in ("out.jsonl", "dir/secret.jsonl"):
        with pytest.raises(InvalidInput, match="leads out"):
            folder.store.resolve(f"{folder.url}/a/{name}", "a")
    for name in ("b/x.jsonl", "loop"):
        with pytest.raises(NotFound):
            folder.store.resolve(f"{folder.url}/a/{name}", "a")
    assert folder.store.resolve(f"{folder.url}/a/again.jsonl", "a") == "a/again.jsonl"


def test_only_plain_files_are_data_sets(folder, tmp_path):
    own = tmp_path / "blobs" / "a"
    own.mkdir(parents=True)
    os.mkfifo(own / "pipe.jsonl")
    (own / "device.jsonl").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "device.jsonl"):
        with pytest.raises((NotFound, InvalidInput)):
            folder.store.resolve(f"{folder.url}/a/{name}", "a")


def test_a_nearly_full_disk_takes_nothing_new(tmp_path):
    settings = RuntimeSettings(home=tmp_path, blobs={"min_free_share": 0.9999999})
    store = open_blobs(settings)
    with pytest.raises(StorageFull) as caught:
        store.create("a/uploads/x.jsonl")
    assert caught.value.problem_code == "insufficient-storage"
    assert not list((tmp_path / "blobs").rglob("*"))


def test_a_disk_that_fills_up_leaves_nothing(folder, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull):
        put(folder.store)
    assert folder.all() == []


@pytest.mark.contract
def test_a_store_that_is_away_can_be_asked_again(tmp_path):
    blobs = {"url": "s3://bucket/x", "endpoint_url": "http://127.0.0.1:9", **KEYS}
    store = open_blobs(RuntimeSettings(home=tmp_path, blobs=blobs))
    with pytest.raises(AsapError) as caught:
        store.size("a/x")
    assert (caught.value.problem_code, caught.value.retryable) == ("blob-unavailable", True)


@pytest.mark.contract
def test_a_bucket_that_is_not_there_is_an_error_for_uploads(bucket, s3_server, tmp_path):
    blobs = {"url": "s3://nowhere-at-all/x", "endpoint_url": s3_server, **KEYS}
    store = open_blobs(RuntimeSettings(home=tmp_path, blobs=blobs))
    with pytest.raises(AsapError):
        put(store)


@pytest.mark.parametrize(
    "url", ["", "blobs", "/blobs", "file://blobs", "http://x/y", "s3://", "s3:///x"]
)
def test_a_url_that_names_no_store(tmp_path, url):
    settings = RuntimeSettings(home=tmp_path, blobs={"url": url or "x"})
    with pytest.raises(Misconfigured, match="file:///FOLDER"):
        open_blobs(settings)


def test_the_default_is_a_folder_at_home_and_keys_are_not_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RuntimeSettings(home="here").blobs_url == f"file://{tmp_path}/here/blobs"
    settings = RuntimeSettings(blobs={"url": "s3://b/x", **KEYS})
    assert "secret'" not in repr(settings.blobs)
