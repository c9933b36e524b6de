"""The prompts of Appendix E as golden text: a changed character is a changed experiment."""

from __future__ import annotations

from pathlib import Path

import pytest

from asap.prompts import coarse_prompt, direct_prompt

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("wording", ["paper", "repo"])
def test_prompts_are_those_of_the_paper_to_the_letter(wording):
    prompts = {
        "direct": direct_prompt("{Q}", "{A}", wording=wording, fence_safety=False),
        "coarse": coarse_prompt("{C}", "{S}", wording=wording, fence_safety=False),
    }
    for name, prompt in prompts.items():
        assert prompt == (GOLDEN / f"{name}_{wording}.txt").read_text().rstrip("\n")
