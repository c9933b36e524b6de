from __future__ import annotations

import json
import os
import signal
import sys

import pytest

from asap_evaluator.isolation import Identity, Limits, Program
from asap_evaluator.process import adopt_orphans, run_programs, sealed
from waiting import PATIENCE_S


class Bare:
    """A level that isolates nothing: what is tested here is the watch from outside."""

    name = "bare"
    stop_signal = signal.SIGTERM

    def __init__(self, *, tells: bool = True) -> None:
        self.tells = tells

    def command(self, program, arguments, status, limits, held):
        wrap = (
            "import json, os, subprocess, sys\n"
            "def tell(**f): os.write(int(sys.argv[1]), json.dumps({k.replace('_', '-'): v"
            " for k, v in f.items()}).encode() + b'\\n')\n"
            f"if {self.tells}: tell(child_pid=os.getpid())\n"
            "code = subprocess.call([sys.executable, '-I', '-c', sys.argv[2], *sys.argv[3:]],"
            " close_fds=False)\n"
            f"if {self.tells}: tell(exit_code=code)\n"
        )
        return [sys.executable, "-I", "-c", wrap, str(status), program.source, *arguments], []


def run(source, limits=None, *, tells=True, **fields):
    program, limits = Program(source=source, **fields), limits or Limits(wall_s=PATIENCE_S)
    (outcome,) = run_programs(Bare(tells=tells), [program], limits, Identity())
    return outcome


def test_brings_back_streams_and_the_exit_code():
    outcome = run("import sys; print(input()); print(2, file=sys.stderr); sys.exit(7)", stdin=b"1")
    assert (outcome.stdout, outcome.stderr, outcome.exit_code) == (b"1\n", b"2\n", 7)
    assert outcome.stop is None
    assert outcome.trouble is None
    assert outcome.cpu_s > 0


def test_setup_and_report_travel_over_descriptors_of_their_own():
    source = "import os, sys; os.write(int(sys.argv[2]), os.read(int(sys.argv[1]), 9)[::-1])"
    assert run(source, setup=b"abc", reports=True).report == b"cba"


def test_the_program_sees_none_of_our_environment():
    assert json.loads(
        run("import json, os; print(json.dumps(dict(os.environ)))").stdout
    ).keys() <= {"LC_CTYPE"}


def test_the_wall_clock_ends_a_run():
    outcome = run("import time; time.sleep(3600)", Limits(wall_s=0.5))
    assert outcome.stop == "wall"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_past_its_cap_ends_the_run_and_is_cut(stream):
    source = f"import sys\nwhile True: sys.{stream}.write('x' * 999)"
    outcome = run(source, Limits(wall_s=PATIENCE_S, output_bytes=5000))
    assert outcome.stop == "output"
    assert getattr(outcome, stream) == b"x" * 5000


def test_resident_memory_ends_a_run():
    # It stops at three times the limit: whoever looks late finds it there.
    source = "import time\nheld = [b'x' * 10**6 + bytes(n) for n in range(300)]\ntime.sleep(3600)"
    outcome = run(source, Limits(wall_s=PATIENCE_S, memory_bytes=100 * 2**20))
    assert outcome.stop == "memory"
    assert outcome.memory_bytes > 100 * 2**20


def test_silence_about_the_end_is_trouble_and_no_failure_of_the_program():
    outcome = run("print(1)", tells=False)
    assert outcome.trouble


def test_others_are_ended_with_the_first():
    patient = Program(source="import time; time.sleep(3600)")
    first, second = run_programs(
        Bare(), [Program(source="print(1)"), patient], Limits(wall_s=PATIENCE_S), Identity()
    )
    assert first.stop is None
    assert second.stop == "done"


def test_partners_talk_over_pipes_that_are_closed_here():
    there, here = os.pipe()
    writer = Program(source="import os, sys; os.write(int(sys.argv[1]), b'hi')", pipes=(here,))
    reader = Program(source="import os, sys; print(os.read(int(sys.argv[1]), 9))", pipes=(there,))
    outcome, _ = run_programs(Bare(), [reader, writer], Limits(wall_s=PATIENCE_S), Identity())
    assert outcome.stdout == b"b'hi'\n"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(here)


def test_no_descriptor_stays_open():
    run("pass")
    before = len(os.listdir("/proc/self/fd"))
    run("pass")
    assert len(os.listdir("/proc/self/fd")) <= before


def test_sealed_content_cannot_be_changed():
    from contextlib import ExitStack

    with ExitStack() as held:
        fd = sealed(b"abc", held)
        assert os.read(fd, 9) == b"abc"
        with pytest.raises(OSError, match="not permitted"):
            os.truncate(f"/proc/self/fd/{fd}", 0)


def test_orphans_come_to_us():
    adopt_orphans()
    source = (
        "import os, time\nif os.fork() == 0:\n  os.setsid(); os.close(1); os.close(2); os._exit(0)"
    )
    assert run(source).exit_code == 0
