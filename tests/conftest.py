"""Fixtures for all tests: real traces, where they are at hand."""

from __future__ import annotations

import gzip
import json
import os
import signal
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).parent.parent

# A slow machine is no failure of a property.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def pytest_configure():
    """Make the suite independent of who runs it, and of how full the disk is.

    What a shell runs in the background ignores Ctrl-C, and so would all that tests start.
    """
    os.environ.setdefault("ASAP_BLOBS__MIN_FREE_SHARE", "0")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_logreport(report):
    """Where engines are required, a contract test that was skipped is a failure."""
    if report.skipped and "contract" in report.keywords and os.environ.get("ASAP_REQUIRE_ENGINES"):
        report.outcome = "failed"


@pytest.fixture(autouse=True)
def no_log_stays_open():
    """A logger that a test configured would write to a stream that has gone with the test."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real CoT triples: ASAP_TEST_DATA, or a `data` folder beside the checkout."""
    beside = [path.parent for path in REPOSITORY.parent.glob("*/data/cot_code.jsonl.gz")]
    folder = os.environ.get("ASAP_TEST_DATA") or next(iter(beside), None)
    if folder is None:
        pytest.skip("no real traces: set ASAP_TEST_DATA to the folder that holds cot_code.jsonl.gz")
    return Path(folder)


def read_gzip(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


@pytest.fixture(scope="session")
def real_traces(test_data) -> list[dict]:
    """All 469 real (question, cot, answer) triples, code and mathematics."""
    return [
        row
        for name in ("cot_code", "cot_math")
        for row in read_gzip(test_data / f"{name}.jsonl.gz")
    ]


@pytest.fixture(scope="session")
def llm_replies(test_data) -> list[dict]:
    """Recorded replies of an LLM to the prompts of stage 1, faithful and flawed."""
    return read_gzip(test_data / "llm_replies.jsonl.gz")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """A tiny random Qwen2 with a byte-level BPE tokenizer that has a BOS token."""
    from tiny_model import build_tiny_model  # imports torch, which most tests do without

    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "bos")


@pytest.fixture(scope="session")
def tiny_model_no_bos_dir(tmp_path_factory) -> Path:
    """The same without a BOS token."""
    from tiny_model import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "no_bos", bos=False)


@pytest.fixture(scope="session")
def tiny_model_merging_dir(tmp_path_factory) -> Path:
    """The same with a SentencePiece-like tokenizer that merges newlines with the next letter."""
    from tiny_model import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "merging", kind="metaspace")
