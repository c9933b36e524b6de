from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from asap_evaluator.sessions import ended, leader, living, signal_all

PARENT = (
    "import subprocess, sys, time\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print('ready', flush=True); time.sleep(600)"
)


@pytest.fixture
def process():
    """A process with a child, in a session of its own."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, start_new_session=True
    ) as started:
        assert started.stdout.readline() == b"ready\n"
        first = leader(started.pid)
        yield started
        signal_all(first, signal.SIGKILL)


def test_a_session_is_its_leader_and_what_that_started(process):
    first = leader(process.pid)
    assert not ended(first)
    assert process.pid in living(first)
    assert len(living(first)) == 2


def test_what_its_leader_leaves_is_found_and_ended(process):
    first = leader(process.pid)
    process.kill()
    process.wait()
    assert ended(first)
    [child] = living(first)
    signal_all(first, signal.SIGKILL)
    while living(first):
        pass
    assert ended(leader(child))


def test_a_dead_leader_that_nobody_has_waited_for_has_ended(process):
    first = leader(process.pid)
    process.kill()
    while not ended(first):
        pass
    assert process.pid not in living(first)
    assert process.wait() == -signal.SIGKILL, "its exit code is still there for whoever asks"


@pytest.mark.parametrize("started", ["another-boot:1", "another-boot:", ""])
def test_a_process_id_that_was_given_away_again_is_not_taken_for_ours(process, started):
    first = leader(process.pid)
    stranger = replace(first, started=started)
    assert ended(stranger)
    assert living(stranger) == []
    signal_all(stranger, signal.SIGKILL)
    assert not ended(first)


def test_nothing_is_left_of_a_session_from_before_the_last_boot(process):
    first = leader(process.pid)
    process.kill()
    process.wait()
    assert living(first)
    assert living(replace(first, started="another-boot:1")) == []
