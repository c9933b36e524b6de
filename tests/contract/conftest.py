"""Real engines, started once per session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engines.vllm_server import VllmServer, missing, serve


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory) -> Iterator[VllmServer]:
    """A vLLM server with a tiny random model; the tests that use it skip where vLLM is missing."""
    if reason := missing():
        pytest.skip(reason)
    from tiny_model import build_tiny_model

    directory = build_tiny_model(tmp_path_factory.mktemp("served"), max_positions=4096)
    with serve(directory) as server:
        yield server
