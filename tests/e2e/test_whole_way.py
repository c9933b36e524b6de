"""The whole way on one machine: traces are pruned, a model is trained on them (real Unsloth) and
served (real vLLM), asked through the gateway by OpenAI's client, and evaluated on HumanEval.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from asap_process import ServerProcess
from engines import vllm_server
from waiting import free_port

openai = pytest.importorskip("openai", reason="comes with vLLM: tests/engines/install.sh PYTHON")

pytestmark = [pytest.mark.contract, pytest.mark.slow, pytest.mark.timeout(600)]

EXAMPLES = Path(__file__).parents[2] / "examples" / "triples.jsonl"
BUDGET = 16
PHRASE_TOKENS = 64
"""More than any closing phrase has."""


def environment(home: Path) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ASAP_")}
    return {**clean, "ASAP_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}


def asap(home: Path, *arguments: object) -> None:
    command = [sys.executable, "-m", "asap_cli.main", *map(str, arguments)]
    done = subprocess.run(
        command, env=environment(home), cwd=home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def model(home) -> Path:
    """A checkpoint of a few steps on pruned traces."""
    if (missing := vllm_server.missing()) is not None:
        pytest.skip(missing)
    lines = EXAMPLES.read_text().splitlines(keepends=True)
    (home / "traces.jsonl").write_text("".join(lines[:12]))
    asap(
        home, "prune", "traces.jsonl", "-o", "pruned.jsonl", "--anchor", "extractive",
        "--scorer", "demo", "--max-tokens", 128, "--yes",
    )  # fmt: skip
    asap(home, "train", "pruned.jsonl", "--preset", "demo", "--set", "max_steps=8", "-o", "model")
    return home / "model"


@pytest.fixture(scope="module")
def server(home):
    server = ServerProcess(home, OMP_NUM_THREADS="2")
    yield server
    server.close()


@pytest.fixture(scope="module")
def deployed(home, model, server):
    """The model behind the gateway; the URL of its own server."""
    port = free_port()
    command = [sys.executable, "-m", "asap_cli.main", "deploy", str(model), "--name", "short"]
    command += ["--port", str(port), "--grace", "1"]
    with (home / "deploy.log").open("w") as log:
        process = subprocess.Popen(command, env=environment(home), cwd=home, stdout=log, stderr=log)

    def is_served() -> bool:
        assert process.poll() is None, (home / "deploy.log").read_text()[-3000:]
        return [one["id"] for one in server.get("/v1/models")["data"]] == ["short"]

    try:
        server.wait_for("the model behind the gateway", is_served)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def test_openais_client_streams_a_chat_with_a_thinking_budget(server, deployed):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="short",
            messages=[{"role": "user", "content": "Write a function that adds two numbers."}],
            max_tokens=160,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"thinking": {"budget_tokens": BUDGET}},
        )
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    usage = chunks[-1].usage
    assert text.count("</think>") == 1
    assert 0 < usage.completion_tokens_details.reasoning_tokens <= BUDGET + PHRASE_TOKENS
    assert usage.completion_tokens > usage.completion_tokens_details.reasoning_tokens


def test_ten_humaneval_tasks_at_two_budgets(home, model, deployed, test_data):
    out = home / "run"
    asap(
        home, "eval", "run", model, "--benchmark", "humaneval", "--data", test_data,
        "--limit", 10, "--budget", "32,64", "--base-url", f"{deployed}/v1",
        "--served-model", "short", "-o", out,
    )  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    strict = [row for row in report["rows"] if row["extraction"] == "strict"]
    assert [row["budget"] for row in strict] == [32, 64]
    for row in strict:
        assert (row["tasks"], row["unscored"]) == (10, 0)
        assert 0 < row["tokens"] <= row["budget"]
    for page in ("report.html", "report.md"):
        assert "humaneval" in (out / page).read_text()
