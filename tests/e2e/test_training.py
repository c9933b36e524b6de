"""From traces to a served model, over HTTP alone: `asap serve`, the real Unsloth, the real vLLM."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import httpx
import psutil
import pytest

from asap.chat_templates import TEMPLATES
from asap.sft import encode_sample
from asap.train_config import TrainConfig
from asap_process import PATIENCE_S, ServerProcess
from asap_runtime.blobs import BlobStore
from asap_runtime.demo_model import demo_directory
from asap_runtime.run_files import RunFiles
from asap_trainer.encoding import HFEncoder
from asap_trainer.samples import read_samples
from engines import vllm_server
from training_runs import stands_still

pytestmark = [pytest.mark.contract, pytest.mark.slow, pytest.mark.timeout(300)]

EXAMPLES = Path(__file__).parents[2] / "examples" / "triples.jsonl"
STEPS, SAVED = 30, 10
CONFIG = {
    "preset": "demo", "max_steps": STEPS, "save_every": SAVED, "accumulation": 2, "log_every": 1,
    "learning_rate": 1e-3,
}  # fmt: skip


class Server(ServerProcess):
    """With what these tests ask of it. A run stands still behind its first checkpoint until it is
    followed.
    """

    def __init__(self, home: Path) -> None:
        python = stands_still(home / "interpreter")
        self.go = python.parent / "go"
        super().__init__(home, ASAP_TRAINER__PYTHON=str(python))

    def train(self, job: str, model: str, **config) -> str:
        """The id of a training job on what that prune job has left."""
        body = {
            "kind": "train", "base": "demo", "model": model, "job": job,
            "config": {**CONFIG, **config},
        }  # fmt: skip
        self.go.unlink(missing_ok=True)
        return self.post("/jobs", json=body)["id"]

    def follow(self, job: str) -> list[tuple[str, dict]]:
        """All of a job's events, to its end."""
        events, name = [], ""
        with self.http.stream("GET", f"/jobs/{job}/events", timeout=PATIENCE_S) as stream:
            for line in stream.iter_lines():
                field, _, value = line.partition(": ")
                if field == "event":
                    name = value
                elif field == "data":
                    events.append((name, json.loads(value)))
                    self.go.touch()
        return events

    def step(self, job: str) -> int:
        """How far the run has come, as far as the API knows."""
        train = self.get(f"/jobs/{job}")["train"]
        return train["progress"]["step"] if train and train["progress"] else 0

    def files(self, job: str) -> RunFiles:
        return RunFiles(BlobStore.in_folder(self.home / "blobs"), f"local/runs/{job}")

    def rows(self, job: str) -> list[dict]:
        return [json.loads(line) for line in self.files(job).read("metrics.jsonl").splitlines()]

    def processes(self, job: str, attempt: int) -> int:
        """The process group of an attempt."""
        folder = self.home / "trainer" / f"asap-train-{job}-{attempt}"
        return int((folder / "pid").read_text())


def lives(group: int) -> bool:
    """Whether a process of the group still runs; who has ended waits there to be asked."""
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
    server = Server(tmp_path_factory.mktemp("home"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def pruned(server):
    """The id of a prune job on the sample traces."""
    options = {"config": {"max_tokens": 128}}
    with EXAMPLES.open("rb") as traces:
        job = server.post(
            "/jobs/upload", files={"file": traces}, data={"options": json.dumps(options)}
        )["id"]
    [*_, (last, state)] = server.follow(job)
    assert (last, state["phase"]) == ("end", "done")
    assert [(c["status"], c["items"]) for c in state["counts"]] == [("succeeded", 48)]
    return job


@pytest.fixture(scope="module")
def trained(server, pruned):
    """An undisturbed training job: its id and its events."""
    job = server.train(pruned, "student")
    server.wait_for("a step", lambda: server.step(job) > 0)
    return job, server.follow(job)


@pytest.fixture(scope="module")
def model(server, trained, tmp_path_factory):
    """The registered model's files as servers get them, hashes checked."""
    folder = tmp_path_factory.mktemp("fetched") / "model"
    sha256 = server.get("/models/student/1")["manifest_sha256"]
    command = ["models", "fetch", "student@1", "--out", str(folder), "--sha256", sha256]
    subprocess.run(
        [sys.executable, "-m", "asap_cli.main", *command],
        env={**os.environ, "ASAP_HOME": str(server.home)},
        check=True,
    )
    return folder


@pytest.fixture(scope="module")
def example(server, trained):
    """The first training sample, encoded as it was trained on."""
    path = server.home / "blobs" / "local" / "runs" / trained[0] / "data.jsonl"
    sample = next(read_samples(path))
    template = TEMPLATES["deepseek-r1"]
    encoder = HFEncoder.load("demo")
    return sample, encode_sample(sample, template, encoder, TrainConfig(preset="demo"))


def nats(directory, example) -> float:
    """Mean loss of an example's labels under a model, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        return model(ids, labels=labels).loss.item()


def test_the_events_show_the_run_from_its_first_step_to_its_model(trained):
    _, events = trained
    states = [state for _, state in events]
    assert [name for name, _ in events] == ["progress"] * (len(events) - 1) + ["end"]
    shown = [state["train"]["progress"] for state in states if state["train"]]
    steps = [progress["step"] for progress in shown if progress]
    assert all(before <= after for before, after in pairwise(steps))
    assert 0 < steps[0] < STEPS
    phases = [progress["phase"] for progress in shown if progress]
    assert phases.index("training") < len(phases) - 1
    end = states[-1]
    assert (end["phase"], end["train"]["version"], end["train"]["attempt"]) == ("done", 1, 0)
    assert end["train"]["progress"]["phase"] == "done"
    assert end["train"]["progress"]["step"] == STEPS


def test_the_loss_falls_and_the_result_says_what_was_trained_on(server, trained, pruned):
    job, events = trained
    train = events[-1][1]["train"]
    result, losses = train["result"], [row["loss"] for row in server.rows(job)]
    assert train["meta"]["job"] == pruned
    assert len(losses) == result["steps"] == STEPS
    assert sum(losses[-SAVED:]) < sum(losses[:SAVED])
    assert result["samples"] + result["held_out"] == 48
    assert result["held_out"] >= 1
    assert result["held_out_loss_before"] > 0
    assert result["held_out_loss_after"] != result["held_out_loss_before"]
    assert 0 < result["response_tokens_per_sample"] < result["tokens_per_sample"]
    assert result["base"] == "demo"
    assert "unsloth" in result["versions"]


def test_the_registry_has_the_model_with_the_figures_of_its_run(server, trained):
    job, events = trained
    version = server.get("/models/student")
    assert (version["version"], version["job_id"]) == (1, job)
    assert version["meta"]["result"] == events[-1][1]["train"]["result"]


def test_the_checkpoint_loads_and_has_learned_its_samples(model, example):
    _, encoded = example
    assert nats(model, encoded) < nats(demo_directory(), encoded)


def test_vllm_serves_it_under_the_prompt_that_was_trained(model, example):
    if reason := vllm_server.missing():
        pytest.skip(reason)
    sample, encoded = example
    prompt = HFEncoder.load(model).encode(TEMPLATES["deepseek-r1"].prompt(sample.question)).ids
    with vllm_server.serve(model, model="student") as engine, httpx.Client(timeout=60) as http:

        def ask(route, **body):
            answer = http.post(f"{engine.base_url}/{route}", json={"model": "student", **body})
            return answer.raise_for_status().json()

        chat = ask(
            "chat/completions",
            messages=[{"role": "user", "content": sample.question}],
            max_tokens=8,
            temperature=0,
        )
        completion = ask("completions", prompt=list(prompt), max_tokens=8, temperature=0)
        scored = ask("completions", prompt=list(encoded.input_ids), max_tokens=1, prompt_logprobs=0)
    assert chat["usage"]["prompt_tokens"] == len(prompt)
    assert completion["usage"]["completion_tokens"] >= 1
    assert chat["choices"][0]["message"]["content"] == completion["choices"][0]["text"]
    [choice] = scored["choices"]
    surprisal = [
        -place[str(token)]["logprob"]
        for place, token, label in zip(
            choice["prompt_logprobs"], encoded.input_ids, encoded.labels, strict=True
        )
        if label >= 0
    ]
    # bfloat16 rounds; the base model is further away than that
    served = sum(surprisal) / len(surprisal)
    assert served == pytest.approx(nats(model, encoded), abs=0.02)
    assert abs(served - nats(demo_directory(), encoded)) > 0.05


def test_a_killed_process_is_launched_again_and_ends_like_the_undisturbed_one(
    server, pruned, trained
):
    job = server.train(pruned, "survivor")
    files = server.files(job)
    server.wait_for("a checkpoint", lambda: files.complete_folders("checkpoints"))
    group = server.processes(job, 0)
    os.killpg(group, signal.SIGKILL)
    assert files.read("result.json") is None
    assert f"checkpoints/step-{STEPS}" not in files.complete_folders("checkpoints")
    [*_, (_, end)] = server.follow(job)
    train = end["train"]
    assert (end["phase"], train["attempt"], train["version"]) == ("done", 1, 1)
    assert not lives(group)
    assert train["progress"]["resumed_from"] >= SAVED
    undisturbed = trained[1][-1][1]["train"]["result"]
    assert train["result"]["steps"] == undisturbed["steps"] == STEPS
    losses = [row["loss"] for row in server.rows(trained[0])]
    assert [row["loss"] for row in server.rows(job)] == pytest.approx(losses, rel=1e-3)


def test_cancelling_ends_the_process_behind_a_last_checkpoint(server, pruned):
    job = server.train(pruned, "unwanted", max_steps=5000, save_every=5000)
    server.wait_for("a step", lambda: server.step(job) > 0)
    group = server.processes(job, 0)
    assert lives(group)
    server.post(f"/jobs/{job}/cancel")
    server.wait_for("the end of the process", lambda: not lives(group))
    server.wait_for("the end", lambda: server.get(f"/jobs/{job}")["phase"] == "cancelled")
    assert server.files(job).complete_folders("checkpoints")
    assert server.files(job).read("result.json") is None
    assert server.http.get("/models/unwanted").status_code == 404
