"""The blob store by URL, a folder or an S3 bucket: whole files under keys that begin with a tenant.

A blob appears under its key when it is complete, or never. No text of a request becomes a path:
keys are ours, and a data set's URI is compared with the store's own address.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self
from uuid import uuid4

from asap.errors import (
    AsapError,
    InvalidInput,
    Misconfigured,
    NotFound,
    StorageFull,
    UpstreamUnavailable,
)
from asap_runtime.settings import RuntimeSettings

__all__ = ["BlobStore", "BlobWriter", "open_blobs"]

UPLOADS = "uploads"
BLOCK = 8 * 2**20
"""Bytes per part of an upload to S3, and per read from it."""
COPY = 2**20
_URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_SEGMENT = re.compile(r"[^\x00-\x1f\x7f\\%?#]+")
_PART = re.compile(r"\..*\.part")
_FULL = (errno.ENOSPC, errno.EDQUOT)


def open_blobs(settings: RuntimeSettings) -> BlobStore:
    """The store of the settings. Raises Misconfigured for a URL that names none."""
    url, group = settings.blobs_url, settings.blobs
    found = _URI.fullmatch(url)
    scheme = found["scheme"].lower() if found else ""
    root = found["rest"].rstrip("/") if found else ""
    if scheme == "file" and root.startswith("/"):
        return BlobStore.in_folder(Path(root), min_free_share=group.min_free_share)
    if scheme != "s3" or not root or root.startswith("/"):
        raise Misconfigured("the blob store's URL must be file:///FOLDER or s3://BUCKET/PREFIX")
    import fsspec

    client = {"endpoint_url": group.endpoint_url, "region_name": group.region}
    keys = [
        None if secret is None else secret.get_secret_value()
        for secret in (group.access_key, group.secret_key)
    ]
    try:
        filesystem = fsspec.filesystem(
            "s3",
            key=keys[0],
            secret=keys[1],
            client_kwargs={name: value for name, value in client.items() if value is not None},
            config_kwargs={"connect_timeout": 5, "read_timeout": 60},
            use_listings_cache=False,  # other replicas write, too
            skip_instance_cache=True,
        )
    except ImportError as error:
        raise Misconfigured("a blob store on s3:// needs the package s3fs") from error
    return BlobStore(filesystem, "s3", root)


@dataclass(frozen=True, slots=True)
class Blob:
    """A stored blob in a listing; its age in seconds by the clocks of store and process."""

    key: str
    age_s: float


class BlobStore:
    """The blobs of all tenants. Blocking; safe to share between threads.

    Every method may raise StorageFull, or UpstreamUnavailable (`blob-unavailable`) when the store
    does not do its part.

    Args:
        filesystem: of fsspec.
        scheme: file or s3.
        root: folder, or bucket with prefix, without a slash at its end.
        min_free_share: of a folder's disk; below it nothing new is stored.
    """

    def __init__(
        self, filesystem: Any, scheme: str, root: str, *, min_free_share: float = 0.0
    ) -> None:
        self._fs, self._scheme, self._root = filesystem, scheme, root
        self._min_free_share = min_free_share
        self._folder = Path(root) if scheme == "file" else None

    @classmethod
    def in_folder(cls, folder: Path, *, min_free_share: float = 0.0) -> Self:
        """A store in a folder, which is made when something is stored."""
        import fsspec

        filesystem = fsspec.filesystem("file")
        return cls(filesystem, "file", str(folder.absolute()), min_free_share=min_free_share)

    def upload_key(self, tenant: str, ending: str) -> str:
        """A new key for a file that a tenant sends."""
        return f"{_checked(tenant)}/{UPLOADS}/{uuid4().hex}{ending}"

    def check_space(self) -> None:
        """Raise StorageFull when the disk of a folder is nearly full."""
        if self._folder is None:
            return
        with _translated():
            self._folder.mkdir(parents=True, exist_ok=True)
            usage = shutil.disk_usage(self._folder)
        if usage.free < self._min_free_share * usage.total:
            raise StorageFull("the server's disk is nearly full; nothing new is stored")

    def create(self, key: str) -> BlobWriter:
        """Begin a blob: `commit` makes it appear, whole."""
        self.check_space()
        return BlobWriter(self._fs, self._path(key), local=self._folder is not None)

    def open(self, key: str) -> IO[bytes]:
        """The blob as a stream that is read forwards. Raises NotFound."""
        with _translated():
            stream = self._fs.open(self._path(key), "rb", block_size=BLOCK)
        return io.BufferedReader(_Raw(stream), COPY)

    def size(self, key: str) -> int:
        """Bytes. Raises NotFound."""
        with _translated():
            return int(self._fs.size(self._path(key)))

    def local(self, key: str) -> AbstractContextManager[Path]:
        """The blob as a file while the block runs: itself, or a copy of it. Raises NotFound."""
        return self._itself(key) if self._folder is not None else self._copied(key)

    def delete(self, key: str) -> None:
        """Delete one blob; without effect when it is gone."""
        try:
            with _translated():
                self._fs.rm_file(self._path(key))
        except NotFound:
            return

    def delete_all(self, tenant: str) -> None:
        """Delete everything of a tenant."""
        try:
            with _translated():
                self._fs.rm(f"{self._root}/{_checked(tenant)}", recursive=True)
        except NotFound:
            return

    def keys_below(self, folder: str) -> list[str]:
        """The keys of all whole blobs below a key, sorted; none when there is no such folder."""
        with _translated():
            paths = self._fs.find(self._path(folder))
        keys = (path.removeprefix(f"{self._root}/") for path in paths)
        return sorted(key for key in keys if not _PART.fullmatch(key.rpartition("/")[2]))

    def delete_below(self, folder: str) -> None:
        """Delete every blob below a key, half-written ones too; without effect on none."""
        try:
            with _translated():
                self._fs.rm(self._path(folder), recursive=True)
        except NotFound:
            return

    def uploads(self) -> Iterator[Blob]:
        """All uploads of all tenants, and what an upload that was killed left half-written."""
        with _translated():
            try:
                folders = self._fs.ls(self._root, detail=False)
            except FileNotFoundError:
                return
        for folder in folders:
            with _translated():
                try:
                    found = self._fs.ls(f"{folder}/{UPLOADS}", detail=True)
                except (FileNotFoundError, NotADirectoryError):
                    continue
            for entry in found:
                changed = entry.get("mtime") or entry["LastModified"].timestamp()
                tenant, name = folder.rpartition("/")[2], entry["name"].rpartition("/")[2]
                yield Blob(f"{tenant}/{UPLOADS}/{name}", time.time() - changed)

    def resolve(self, uri: str, tenant: str) -> str:
        """The key of a data set that a request names.

        Only what stands below the tenant's own folder of this store can be named. Raises
        InvalidInput for an address elsewhere, or one written to look like another; NotFound for
        what is not there and for what is another tenant's, in the same words.
        """
        key = self._key_of(uri)
        owner, _, rest = key.partition("/")
        if owner != tenant or not rest or rest.startswith(f"{UPLOADS}/"):
            raise _missing()
        if self._folder is not None:
            self._check_links(self._folder, tenant, key)
        try:
            with _translated():
                kind = self._fs.info(self._path(key))["type"]
        except NotFound:
            raise _missing() from None
        if kind != "file":
            raise _missing()
        return key

    def _key_of(self, uri: str) -> str:
        found = _URI.fullmatch(uri)
        if found is None or found["scheme"].lower() != self._scheme:
            raise _refused(f"expected an address that begins with {self._scheme}://")
        segments = found["rest"].split("/")[1 if self._folder is not None else 0 :]
        if any(s in ("", ".", "..") or not _SEGMENT.fullmatch(s) for s in segments):
            raise _refused("expected plain names between single slashes")
        root = self._root.strip("/").split("/")
        path = found["rest"].strip("/").split("/")
        absolute = found["rest"].startswith("/") == (self._folder is not None)
        if not absolute or path[: len(root)] != root:
            raise _refused("it is not in the server's blob store")
        return "/".join(path[len(root) :])

    def _check_links(self, folder: Path, tenant: str, key: str) -> None:
        try:
            root, target = folder.resolve(), (folder / key).resolve()
        except RuntimeError:  # links in a circle
            raise _missing() from None
        if not target.is_relative_to(root):
            raise _refused("it leads out of the server's blob store")
        if not target.is_relative_to(root / tenant):
            raise _missing()

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    @contextmanager
    def _itself(self, key: str) -> Iterator[Path]:
        path = Path(self._path(key))
        if not path.is_file():
            raise NotFound("the blob is gone")
        yield path

    @contextmanager
    def _copied(self, key: str) -> Iterator[Path]:
        with tempfile.NamedTemporaryFile(prefix="asap-blob-") as copy:
            with self.open(key) as stream, _translated():
                shutil.copyfileobj(stream, copy, COPY)
                copy.flush()
            yield Path(copy.name)


class BlobWriter:
    """A blob that is being written; as a context manager it is kept when the block ends well.

    `size` and `sha256` are those of the bytes so far.
    """

    def __init__(self, filesystem: Any, path: str, *, local: bool) -> None:
        self._path, self._local = path, local
        folder, _, name = path.rpartition("/")
        # A name of its own: a process taken for dead may still write the same blob.
        self._part = Path(folder, f".{name}.{uuid4().hex}.part")
        self._hash, self.size = hashlib.sha256(), 0
        self._stream: Any
        with _translated():
            if local:
                self._part.parent.mkdir(parents=True, exist_ok=True)
                self._stream = self._part.open("wb")
            else:
                self._stream = filesystem.open(path, "wb", autocommit=False, block_size=BLOCK)

    @property
    def sha256(self) -> str:
        """Of what has been written, in hexadecimal."""
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()

    def write(self, data: bytes) -> None:
        """Append bytes."""
        with _translated():
            self._stream.write(data)
        self._hash.update(data)
        self.size += len(data)

    def commit(self) -> None:
        """The blob is whole: it appears under its key. When this raises, nothing is left."""
        try:
            with _translated():
                if self._local:
                    self._stream.flush()
                    os.fsync(self._stream.fileno())
                    self._stream.close()
                    os.replace(self._part, self._path)
                else:
                    self._stream.close()
                    self._stream.commit()
        except AsapError:
            self.discard()
            raise

    def discard(self) -> None:
        """Leave nothing. Never raises: what a store in trouble keeps is swept as an orphan."""
        with suppress(Exception):
            if self._local:
                self._part.unlink(missing_ok=True)
                self._stream.close()
            else:
                self._stream.closed = True  # or its end would upload what is left after all
                self._stream.discard()


class _Raw(io.RawIOBase):
    """A storage library's stream with our errors."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _translated():
            data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _checked(tenant: str) -> str:
    if tenant in ("", ".", "..") or "/" in tenant or not _SEGMENT.fullmatch(tenant):
        raise InvalidInput("the tenant's name cannot be part of a blob's key")
    return tenant


def _missing() -> NotFound:
    return NotFound("there is no such data set in the server's blob store")


def _refused(reason: str) -> InvalidInput:
    detail = f"the data set's address cannot be used: {reason}"
    return InvalidInput(detail, errors=[{"pointer": "/dataset", "detail": detail}])


@contextmanager
def _translated() -> Iterator[None]:
    """Whatever a storage library raises, as one of three errors."""
    try:
        yield
    except AsapError:
        raise
    except FileNotFoundError as error:
        raise NotFound("the blob is gone") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise StorageFull("the server's disk is full; nothing was stored") from error
        raise UpstreamUnavailable(
            "the blob store does not answer as it should; the request can be repeated",
            code="blob-unavailable",
        ) from error
