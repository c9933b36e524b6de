"""The training process from spec.json to result.json, killed, stopped and refused. Real processes
with TRL alone; what Unsloth does differently is in tests/contract/test_train_unsloth.py.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from asap.runs import TrainProgress, TrainResult
from asap.sft import learning_rate
from training_runs import STORED_FIRST, make_run, signals_itself, triples

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SECRET = "zebra-crossing-text"
MAIN = "from asap_trainer.train import main\nsys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_model_dir):
    run = make_run(tmp_path_factory.mktemp("undisturbed"), tiny_model_dir, backend="plain")
    done = run.carry_out(code=["-c", STORED_FIRST + MAIN])
    assert done.returncode == 0
    assert done.stdout == ""
    return run


def losses(run):
    return {row["step"]: row["loss"] for row in run.rows()}


def test_a_run_leaves_its_result_and_its_last_figures(undisturbed):
    result = TrainResult.model_validate(undisturbed.json("result.json"))
    assert result.steps == 30
    assert result.samples + result.held_out == 16
    assert result.held_out >= 1
    assert result.loss_last < result.loss_first
    assert result.held_out_loss_after < result.held_out_loss_before
    assert result.template == "deepseek-r1"
    assert 0 < result.response_tokens_per_sample < result.tokens_per_sample
    assert result.tokens_per_step == pytest.approx(2 * result.tokens_per_sample, rel=0.3)
    progress = TrainProgress.model_validate(undisturbed.json("progress.json"))
    assert (progress.phase, progress.step, progress.total_steps) == ("done", 30, 30)
    assert 0 < progress.mfu < 1.5
    assert undisturbed.files.read("problem.json") is None
    for name in ("dropped.jsonl", "model/dropped.jsonl"):
        assert undisturbed.files.read(name) == b""


def test_the_ledger_of_dropped_samples_lies_with_the_run_and_its_model(tmp_path, tiny_model_dir):
    rows = [*triples(4), {**triples(1)[0], "id": "long", "cot": "so " * 300}]
    run = make_run(tmp_path, tiny_model_dir, rows, backend="plain", max_steps=1)
    assert run.carry_out().returncode == 0
    [line] = run.files.read("dropped.jsonl").splitlines()
    assert run.files.read("model/dropped.jsonl").splitlines() == [line]
    dropped = json.loads(line)
    assert (dropped["id"], dropped["reason"]) == ("long", "too-long")
    assert dropped["tokens"] > 256


def test_every_step_has_the_rate_of_the_recipe(undisturbed):
    rows, config = undisturbed.rows(), undisturbed.spec.config
    assert [row["step"] for row in rows] == list(range(1, 31))
    for row in rows:
        expected = learning_rate(row["step"] - 1, 30, config, 3e-3)
        assert row["learning_rate"] == pytest.approx(expected, abs=1e-12)


def test_the_two_newest_checkpoints_are_kept_and_whole(undisturbed):
    files = undisturbed.files
    assert files.complete_folders("checkpoints") == ["checkpoints/step-20", "checkpoints/step-30"]
    names = {path.name for path in (undisturbed.folder / "checkpoints" / "step-30").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= names
    assert "rng_state.pth" in names


def test_a_machine_keeps_nothing_of_a_run_that_is_done(undisturbed):
    assert not list((undisturbed.home / "training").iterdir())


def test_a_run_that_is_told_to_stop_leaves_a_checkpoint_and_goes_on_there(
    undisturbed, tmp_path, tiny_model_dir
):
    run = make_run(tmp_path, tiny_model_dir, backend="plain")
    told = signals_itself("checkpoints/step-10/manifest.json", signal.SIGTERM, stored=True)
    assert run.carry_out(code=told).returncode == 143
    assert run.files.read("result.json") is None
    newest = run.files.complete_folders("checkpoints")[-1]
    stopped = int(newest.rpartition("-")[2])
    assert stopped == 11
    assert run.carry_out().returncode == 0
    assert run.json("progress.json")["resumed_from"] == stopped
    check_same(run, undisturbed)


def test_a_run_that_is_killed_while_it_stores_a_checkpoint_goes_on_with_the_one_before(
    undisturbed, tmp_path, tiny_model_dir
):
    run = make_run(tmp_path, tiny_model_dir, backend="plain")
    # Where the second checkpoint is half in the store.
    killed = signals_itself("checkpoints/step-20/manifest.json", signal.SIGKILL, stored=False)
    done = run.carry_out(code=killed)
    assert done.returncode == -signal.SIGKILL
    assert (run.folder / "checkpoints" / "step-20" / "model.safetensors").exists()
    assert run.files.complete_folders("checkpoints") == ["checkpoints/step-10"]
    assert run.carry_out().returncode == 0
    assert run.json("progress.json")["resumed_from"] == 10
    check_same(run, undisturbed)


def check_same(run, undisturbed):
    """The loss of each step and the end are those of a run that nothing happened to."""
    assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-4)
    result, expected = run.json("result.json"), undisturbed.json("result.json")
    assert result["steps"] == expected["steps"] == 30
    for name in ("held_out_loss_before", "held_out_loss_after", "tokens_per_step"):
        assert result[name] == pytest.approx(expected[name], rel=1e-4)


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(undisturbed, tmp_path, tiny_model_dir):
    run = make_run(tmp_path, tiny_model_dir, backend="plain")
    # The same run, as if it had been killed behind its last checkpoint.
    for name in ("checkpoints/step-20", "checkpoints/step-30"):
        undisturbed.files.download_folder(name, tmp_path / "copy")
        run.files.upload_folder(tmp_path / "copy", name)
    weights = run.folder / "checkpoints" / "step-30" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = run.carry_out()
    assert done.returncode == 0
    assert "checkpoint.skipped" in done.stderr
    assert run.json("progress.json")["resumed_from"] == 20
    check_same(run, undisturbed)


def test_a_run_killed_behind_its_last_step_is_finished_without_another(tmp_path, tiny_model_dir):
    run = make_run(tmp_path, tiny_model_dir, backend="plain", max_steps=4, save_every=4)
    assert run.carry_out().returncode == 0
    first = run.json("result.json")
    run.files.delete("result.json")
    run.files.delete_folder("model")
    assert run.carry_out().returncode == 0
    second = run.json("result.json")
    assert run.json("progress.json")["resumed_from"] == 4
    for name in ("steps", "loss_first", "loss_last", "tokens_per_step"):
        assert first[name] == second[name]
    assert second["held_out_loss_after"] == pytest.approx(first["held_out_loss_after"], rel=1e-5)


def test_the_model_loads_and_its_template_is_the_one_it_was_trained_with(undisturbed, tmp_path):
    import transformers

    from asap.sft import TEMPLATES

    sha256 = undisturbed.files.download_folder("model", tmp_path / "model")
    assert sha256 == undisturbed.json("result.json")["model_sha256"]
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    turn = [{"role": "user", "content": "What is 2 plus 2?"}]
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert prompt == TEMPLATES["deepseek-r1"].prompt("What is 2 plus 2?")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    before = transformers.AutoModelForCausalLM.from_pretrained(undisturbed.spec.base)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not model.state_dict()[name].equal(before.state_dict()[name])


@pytest.mark.parametrize(
    ("config", "rows", "code"),
    [
        ({"gpus": 1}, None, "misconfigured"),
        ({"template": "chatml"}, None, "unknown-chat-form"),
        ({"max_seq_length": 16}, None, "nothing-to-train"),
        ({}, [{"question": "no cot"}], "invalid-input"),
    ],
    ids=["no such device", "other template", "all too long", "no sample"],
)
def test_what_cannot_work_is_refused_with_its_reason(tmp_path, tiny_model_dir, config, rows, code):
    run = make_run(tmp_path, tiny_model_dir, rows, backend="plain", **config)
    assert run.carry_out().returncode == 78
    problem = run.json("problem.json")
    assert problem["code"] == code
    assert problem["detail"]
    assert run.files.read("result.json") is None


def test_a_run_without_a_spec_is_refused(tmp_path, tiny_model_dir):
    run = make_run(tmp_path, tiny_model_dir, backend="plain")
    run.files.delete("spec.json")
    assert run.carry_out().returncode == 78
    assert run.json("problem.json")["code"] == "misconfigured"


def test_a_crash_says_where_and_quotes_no_text(tmp_path, tiny_model_dir):
    rows = [{**row, "question": SECRET} for row in triples()]
    rows = [{**row, "id": f"x{n}"} for n, row in enumerate(rows)]
    run = make_run(tmp_path, tiny_model_dir, rows, backend="plain")
    code = (
        "import asap_trainer.loop as loop, sys\n"
        "def fails(self, *_):\n"
        f"    raise ValueError({SECRET!r})\n"
        "loop.Loop.run = fails\n"
        "from asap_trainer.train import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = run.carry_out(code=["-c", code])
    assert done.returncode == 1
    problem = run.json("problem.json")
    assert problem["code"] == "training-failed"
    assert "ValueError" in problem["detail"]
    last = json.loads(problem["log"].splitlines()[-1])
    assert any("fails" in frame for frame in last["frames"])
    assert SECRET not in json.dumps(problem)
    assert SECRET not in done.stderr


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, tiny_model_dir):
    run = make_run(tmp_path, tiny_model_dir, backend="plain", learning_rate=1e30, warmup_ratio=0)
    assert run.carry_out().returncode == 1
    problem = run.json("problem.json")
    assert problem["code"] == "training-failed"
    assert "no number" in problem["detail"]


def test_several_processes_share_the_weights_and_take_the_same_steps(tmp_path, tiny_model_dir):
    """FSDP2 with two processes of one row each against one process with two rows."""
    few = {"max_steps": 9, "save_every": 3}  # rounding grows from step to step
    one = make_run(tmp_path, tiny_model_dir, backend="plain", batch_size=2, **few)
    two = make_run(tmp_path, tiny_model_dir, backend="plain", batch_size=1, **few)
    assert one.carry_out().returncode == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    script = ["tests/services/trainer/fsdp_on_cpu.py"]
    done = two.carry_out(code=[*launch, *script])
    assert done.returncode == 0
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    names = {path.name for path in (two.folder / "checkpoints" / "step-6").iterdir()}
    assert "pytorch_model_fsdp.bin" in names  # of DDP it would not be there
    assert two.json("result.json")["held_out_loss_after"] == pytest.approx(
        one.json("result.json")["held_out_loss_after"], rel=1e-3
    )
    # And once more, from the checkpoint before the last.
    two.files.delete_folder("checkpoints/step-9")
    assert two.carry_out(code=[*launch, *script]).returncode == 0
    assert two.json("progress.json")["resumed_from"] == 6
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)


def test_processes_wait_for_hours_while_the_first_one_fetches_and_encodes(tmp_path):
    """torch's own ten minutes are less than a 7B model may take to come."""
    script = tmp_path / "waits.py"
    script.write_text(
        "import os, torch, torch.distributed as dist\n"
        "from asap_trainer.backends import Device\n"
        "from asap_trainer.train import _one_after_another\n"
        "with _one_after_another(Device(torch.device('cpu'), torch.float32, False, 2)):\n"
        "    pass\n"
        "group = dist.group.WORLD._get_backend(torch.device('cpu'))\n"
        "os.write(1, f'{group.options._timeout.total_seconds()}\\n'.encode())\n"
        "dist.destroy_process_group()\n"
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [sys.executable, *launch], capture_output=True, text=True, check=True, timeout=300
    )
    assert [float(line) >= 2 * 3600 for line in done.stdout.split()] == [True, True]


def test_a_preflight_measures_and_trains_nothing(tmp_path, tiny_model_dir):
    run = make_run(tmp_path, tiny_model_dir, backend="plain")
    of_the_run = run.home / "training" / run.spec.id / "checkpoint-10"  # which may be under way
    of_the_run.mkdir(parents=True)
    done = run.carry_out("--preflight", "--price", "2.5")
    assert done.returncode == 0
    assert of_the_run.exists()
    answer = json.loads(done.stdout)
    assert answer == run.json("preflight.json")
    asked = answer["asked"]
    assert asked["fits"]
    assert asked["steps"] == 30
    assert asked["usd"] == pytest.approx(2.5 * asked["hours"])
    assert asked["hours"] * 3600 == pytest.approx(30 * asked["step_seconds"])
    assert asked["peak_memory_bytes"] > 50e6
    assert len(answer["suggestions"]) <= 3
    assert all(one["hours"] < asked["hours"] for one in answer["suggestions"])
    assert run.files.read("result.json") is None
