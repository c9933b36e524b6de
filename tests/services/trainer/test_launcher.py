from __future__ import annotations

import json

import pytest

from asap.runs import Launch
from asap_trainer.launcher import LOG_LINES, ended, launch_name, own_lines, run_id_of

RUN = "0123456789abcdef" * 2


def event(number=0, **fields):
    return json.dumps({"event": "x", "level": "info", "timestamp": "t", "n": number} | fields)


@pytest.mark.parametrize("attempt", [0, 9, 12])
def test_a_name_tells_its_run(attempt):
    name = launch_name(RUN, attempt)
    assert len(f"{name}-63") <= 63, "the host names of its pods are labels of DNS"
    assert run_id_of(Launch(launcher="subprocess", name=name, attempt=attempt)) == RUN


def test_exit_codes_are_the_contract():
    assert [ended(code).phase for code in (0, 143)] == ["succeeded", "evicted"]
    reasons = {code: ended(code, ["line"]).reason for code in (1, 2, 78, 137, 139)}
    assert reasons == {
        1: "crashed", 2: "crashed", 78: "refused", 137: "out-of-memory", 139: "crashed",
    }  # fmt: skip
    assert ended(1, ["line"]).log == ("line",)


def test_only_events_of_the_process_are_shown():
    text = "\n".join(
        [
            "a print of a library with a sample",
            event(1),
            'Traceback: {"question": "secret"}',
            '{"question": "secret"}',
            '["event", "level", "timestamp"]',
            "5",
            "",
        ]
    )
    assert own_lines(text) == (event(1),)


def test_the_last_lines_are_shown():
    lines = [event(n) for n in range(LOG_LINES + 7)]
    assert own_lines("\n".join(lines)) == tuple(lines[7:])
