"""`asap deploy`: a model behind a vLLM server of this machine, announced to the gateways.

The announcement is a lease in the database of the settings. It is renewed while the server is
healthy, and taken back at the end: first no new requests, then, when those under way have ended, no
server.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from asap.errors import AsapError, InvalidInput
from asap_cli.roles import AllSettings
from asap_evaluator.model_cache import ModelCache, ModelSource
from asap_evaluator.server import VllmOptions, VllmServer
from asap_evaluator.serving import vllm_options
from asap_runtime.blobs import open_blobs
from asap_runtime.endpoints import LEASE_S, EndpointRegistry, check_url
from asap_runtime.host import open_database
from asap_runtime.logs import configure_logs, get_logger
from asap_runtime.model_files import locate_model
from asap_runtime.models import ModelRegistry, ModelVersion, parse_reference
from asap_runtime.settings import load_settings

__all__ = ["DeployOptions", "registered", "run_deploy", "served_name"]

BEAT_S = LEASE_S / 3
LOOK_S = 0.5
ANY_ADDRESS = ("0.0.0.0", "::")
BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting")


@dataclass(frozen=True, slots=True)
class DeployOptions:
    """One command."""

    model: str
    """Directory, hub name, or `name@version` of the registry."""
    name: str | None = None
    """What callers name it; default: the registry's name, the directory's, or the hub's."""
    host: str = "127.0.0.1"
    port: int | None = None
    """Default: a free one."""
    url: str | None = None
    """Where gateways reach it; default: host and port."""
    tenant: str = "local"
    server_args: tuple[str, ...] = ()
    """Further arguments of `vllm serve`."""
    grace_s: float = 60.0
    """For requests under way, at the end."""


def run_deploy(options: DeployOptions) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit code.

    Raises UpstreamUnavailable when the server does not start, or dies again and again.
    """
    settings = load_settings(AllSettings)
    configure_logs(settings.telemetry)
    _check(options)
    database = open_database(settings)
    try:
        version = registered(ModelRegistry(database), options)
        name = served_name(options)
        directory = _directory(settings, options.model, version)
        server = VllmServer(
            _server_options(settings, options, directory, name),
            settings.evaluator_dir / _folder(name),
        )
        deployment = _Deployment(
            server,
            EndpointRegistry(database),
            tenant=options.tenant,
            model=name,
            version=None if version is None else version.version,
            url=options.url,
        )
        asyncio.run(_served(deployment, name, options.grace_s))
    finally:
        database.close()
    return 0


class _Deployment:
    """A server and its place in the table of endpoints."""

    def __init__(
        self,
        server: VllmServer,
        endpoints: EndpointRegistry,
        *,
        tenant: str,
        model: str,
        version: int | None,
        url: str | None,
    ) -> None:
        self.server = server
        self._endpoints, self._tenant, self._model = endpoints, tenant, model
        self._version, self._url = version, url
        self._announced: str | None = None
        self._ended = False
        self._turn = threading.Lock()
        self._log = get_logger()

    @property
    def url(self) -> str:
        """Where gateways reach it."""
        return self._url or self.server.url

    async def announce(self) -> None:
        """Renew the lease while the server is healthy, until cancelled."""
        while True:
            if self.server.up:
                try:
                    await asyncio.to_thread(self._renew)
                except AsapError as error:  # the database is away; the lease has time
                    self._log.warning("endpoint.not_announced", code=error.problem_code)
            await asyncio.sleep(BEAT_S)

    async def leave(self, grace_s: float) -> None:
        """No new requests; return when those under way have ended, or after `grace_s`."""
        url = self._announced
        if url is None:
            return
        with suppress(AsapError):
            await asyncio.to_thread(self._endpoints.drain, self._tenant, self._model, url)
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while await _busy(self.server):  # noqa: ASYNC110 - of another process
                    await asyncio.sleep(LOOK_S)

    async def withdraw(self) -> None:
        """Forget the endpoint. Where the database is away its lease ends by itself."""
        with suppress(AsapError):
            await asyncio.to_thread(self._forget)

    def _renew(self) -> None:
        with self._turn:
            if self._ended:  # this thread has outlived its task
                return
            url = self.url
            if self._announced not in (None, url):  # started anew on another port
                self._endpoints.withdraw(self._tenant, self._model, str(self._announced))
            self._endpoints.announce(self._tenant, self._model, url, version=self._version)
            self._announced = url

    def _forget(self) -> None:
        with self._turn:
            self._ended = True
            if self._announced is not None:
                self._endpoints.withdraw(self._tenant, self._model, self._announced)


async def _served(deployment: _Deployment, name: str, grace_s: float) -> None:
    """Until a signal, or until the server is given up, which is raised."""
    stopped, loop, server = asyncio.Event(), asyncio.get_running_loop(), deployment.server
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    say = Console(stderr=True)
    say.print(f"starting vLLM, log in {server.log}", highlight=False, markup=False)
    try:
        await _until(stopped, server.start())
        if stopped.is_set():
            return
        say.print(f"{name} is served at {deployment.url}", highlight=False, markup=False)
        await _until(stopped, server.watch(), deployment.announce())
        stopped.clear()
        await _until(stopped, deployment.leave(grace_s))  # or until the second signal
    finally:
        await deployment.withdraw()
        await server.stop()


async def _until(stopped: asyncio.Event, *work: Coroutine[Any, Any, None]) -> None:
    """Until the event is set or some of the work has ended; the rest is cancelled. Raises what the
    work raised.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    waiting = asyncio.ensure_future(stopped.wait())
    try:
        await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for one in (waiting, *tasks):
            one.cancel()
        await asyncio.gather(waiting, *tasks, return_exceptions=True)


async def _busy(server: VllmServer) -> bool:
    """Whether the server works on a request, by its own metrics."""
    try:
        async with httpx.AsyncClient(timeout=5.0, trust_env=False) as client:
            text = (await client.get(f"{server.url}/metrics")).text
    except httpx.HTTPError:
        return False
    counts = (line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(BUSY))
    return any(float(count) > 0 for count in counts)


def _check(options: DeployOptions) -> None:
    if options.url is not None:
        check_url(options.url)
    elif options.host in ANY_ADDRESS:
        raise InvalidInput(
            f"{options.host} is no address that gateways could call; name it with --url, such as "
            f"http://{socket.gethostname()}:8001"
        )
    if options.url is not None and options.port is None:
        raise InvalidInput("--url needs --port: a free port is another one at each start")


def registered(registry: ModelRegistry, options: DeployOptions) -> ModelVersion | None:
    """The model as the registry knows it; None for what is no reference. Raises NotFound."""
    reference = parse_reference(options.model)
    return None if reference is None else registry.get(options.tenant, *reference)


def served_name(options: DeployOptions) -> str:
    """What callers name the model."""
    reference = parse_reference(options.model)
    if options.name is not None:
        return options.name
    if reference is not None:
        return reference[0]
    folder = Path(options.model).expanduser()
    return folder.resolve().name if folder.is_dir() else options.model.rpartition("/")[2]


def _directory(settings: AllSettings, model: str, version: ModelVersion | None) -> Path:
    if version is None:
        return locate_model(model, weights=True)
    own = settings.evaluator
    cache = ModelCache(
        settings.evaluator_dir / "models", open_blobs(settings), kept=own.kept_models
    )
    return cache.locate(ModelSource(version.reference, version.prefix, version.manifest_sha256))


def _folder(name: str) -> str:
    return "deploy-" + "".join(c if c.isalnum() or c in "._-" else "-" for c in name)


def _server_options(
    settings: AllSettings, options: DeployOptions, directory: Path, name: str
) -> VllmOptions:
    """An evaluation's server with what live serving wants else: a cache of prefixes, and the
    model's own defaults for callers who name none.
    """
    base = vllm_options(settings.evaluator.vllm, directory)
    key = settings.serving.api_key
    secret = {} if key is None else {"VLLM_API_KEY": key.get_secret_value()}
    live: Sequence[str] = ("--enable-prefix-caching", "--generation-config", "auto")
    return replace(
        base,
        name=name,
        host=options.host,
        port=options.port,
        args=(*base.args, *live, *options.server_args),
        environment={**base.environment, **secret},
    )
