"""What the paper and the authors' scripts state, as assertions on the presets."""

from __future__ import annotations

import pytest

from asap.config import PruneConfig

PAPER = {  # §4.1, Algorithms 1 and 2
    "tau": 0.6,
    "max_tokens": 4096,
    "direct_temperature": 0.0,
    "rewrite_temperature": 2.0,
    "max_reply_tokens": 16384,
    "split": "paper",
    "match": "paper",
    "project": "llm_text",
    "protocol": "rewrite",
    "score": "first_token_surprisal",
    "mode": "global",
    "wording": "paper",
    "context": "raw",
    "method": "asap",
}
SCRIPTS = {
    "wording": "repo",
    "answer_code": "first",
    "autojunk": True,
    "containment": 0.0,
    "min_keep": 0.0,
    "min_steps": 0,
    "count_bos": True,
    "on_fail": "drop",
    "max_tokens": 1024,
    "max_attempts": 1,
}
REPAIRED = {
    "tau": 0.6,
    "max_tokens": 4096,
    "autojunk": False,
    "containment": 0.9,
    "min_keep": 0.02,
    "fidelity": 0.95,
    "step_share": 0.5,
    "match": "align",
    "project": "origin_steps",
    "split": "safe",
    "answer_code": "last",
    "max_attempts": 5,
    "on_fail": "original",
    "min_steps": 1,
    "count_bos": False,
    "context": "raw",
    "fence_safety": True,
}


@pytest.mark.parametrize(
    ("preset", "values"), [("paper", PAPER), ("repo", SCRIPTS), ("default", REPAIRED)]
)
def test_presets(preset, values):
    config = PruneConfig(preset=preset)
    assert {name: getattr(config, name) for name in values} == values
