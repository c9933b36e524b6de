"""`asap eval run` in front of a real vLLM, with the real sandbox."""

from __future__ import annotations

import json
import os
import sys

import pytest

from asap.eval_items import EvalItem
from asap_cli.main import main
from evaluation_stages import human_eval

pytestmark = [pytest.mark.contract, pytest.mark.slow, pytest.mark.timeout(420)]


def asap(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["asap", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code or 0


def test_two_tasks_at_two_budgets(vllm_server, tiny_model_dir, tmp_path, monkeypatch, capsys):
    for name in [name for name in os.environ if name.startswith("ASAP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ASAP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ASAP_EVALUATOR__REFERENCE_CPU_S", "10")
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps(human_eval(f"T/{n}")) + "\n" for n in range(3))
    )
    command = [
        "eval", "run", tiny_model_dir, "--benchmark", "mine", "--data", tmp_path, "--limit", 2,
        "--budget", "8,48", "--set", "template=deepseek-r1", "--base-url", vllm_server.base_url,
        "--served-model", vllm_server.model, "-o", tmp_path / "out",
    ]  # fmt: skip
    assert asap(monkeypatch, *command) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {(row["budget"], row["extraction"]): row for row in report["rows"]}
    assert sorted(rows) == [(8, "lenient"), (8, "strict"), (48, "lenient"), (48, "strict")]
    for (budget, _), row in rows.items():
        assert (row["tasks"], row["unscored"]) == (2, 0)
        assert 0 < row["tokens"] <= budget
    found = {}
    for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines():
        item = EvalItem.model_validate_json(line)
        found[item.problems[0].task_id] = item
    assert sorted(found) == ["T/0", "T/1"]
    for item in found.values():
        assert {sample.budget for sample in item.samples} == {8, 48}
        assert all(sample.reasoning_tokens is not None for sample in item.samples)
    before = (tmp_path / "out" / "items.jsonl").read_bytes()
    assert asap(monkeypatch, *command) == 0
    assert (tmp_path / "out" / "items.jsonl").read_bytes() == before
