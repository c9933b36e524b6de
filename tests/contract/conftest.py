"""Real engines, started once per session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engines.vllm_server import VllmServer, build_tiny_chat_model, missing, serve


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory) -> Iterator[VllmServer]:
    """A vLLM server with a tiny random model; the tests that use it skip where vLLM is missing."""
    if reason := missing():
        pytest.skip(reason)
    with serve(build_tiny_chat_model(tmp_path_factory.mktemp("tiny-chat-model"))) as server:
        yield server
