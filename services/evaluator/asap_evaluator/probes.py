"""Ten attempts to do harm from inside a sandbox. A level that lets one succeed is not used."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from asap_evaluator.isolation import Identity, Limits, Outcome, Program, Run

__all__ = ["PROBES", "self_test"]

DONE, GOT = "tried", "succeeded"
LIMITS = Limits(cpu_s=5, wall_s=10.0)
SECRETS = (
    "/var/run/secrets/kubernetes.io/serviceaccount/token",
    "/var/run/docker.sock",
    "/run/containerd/containerd.sock",
    "/run/crio/crio.sock",
    "/run/podman/podman.sock",
)
"""What a program must not even see, wherever it runs."""
METADATA = ("169.254.169.254", 80)
"""Where clouds hand out credentials."""

PROBES: dict[str, str] = {
    "host file": """
for path in [{file!r}, *{secrets!r}]:
    attempt(lambda: open(path, "rb").read())
    attempt(lambda: socket.socket(socket.AF_UNIX).connect(path) or True)
""",
    "host environment": """
attempt(lambda: any(open(f"/proc/{{pid}}/environ").read() for pid in [1, {parent}]))
attempt(lambda: set(os.environ) - {{"PATH", "HOME", "LANG", "PWD", "OPENBLAS_NUM_THREADS"}})
""",
    "kernel settings": """
for name in "kernel/core_pattern kernel/modprobe vm/drop_caches kernel/hostname".split():
    attempt(lambda: open(f"/proc/sys/{{name}}", "r+b"))
""",
    "TCP": """
for address in [("127.0.0.1", {tcp}), {metadata!r}]:
    attempt(lambda: socket.create_connection(address, 0.5))
""",
    "UDP": """
attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", {udp})))
""",
    "abstract socket": """
attempt(lambda: socket.socket(socket.AF_UNIX).connect({abstract!r}) or True)
""",
    "signal": """
import signal
attempt(lambda: os.kill({victim}, signal.SIGKILL) or True)
attempt(lambda: os.kill({parent}, 0) or {parent} > 9)
""",
    "fork bomb": """
born = 0
while born < 1000:
    try:
        if os.fork() == 0:
            time.sleep(60)
        born += 1
    except OSError:
        break
attempt(lambda: born >= {processes})
""",
    "memory": """
held = [bytearray(os.urandom(1) * 2**26) for _ in range(16)]
time.sleep(5)
attempt(lambda: held)
""",
    "write outside": """
for path in ["/probe", "/etc/probe", "/usr/probe", "/var/tmp/probe", "/dev/probe", {file!r}]:
    attempt(lambda: open(path, "ab").write(b"x"))
""",
}
"""Each probe's text after PREFIX; `attempt` notes what returned something true."""
PREFIX = f"""import os, socket, time
def attempt(action):
    try:
        done = action()
    except (OSError, MemoryError):
        done = False
    if done:
        print("{GOT}", flush=True)
"""


@dataclass(frozen=True)
class _Bait:
    """What the probes try to reach."""

    facts: dict[str, object]
    victim: subprocess.Popen[bytes]
    listeners: tuple[socket.socket, ...]
    file: Path

    def untouched(self) -> bool:
        """Whether nothing arrived, nothing was written and nobody was killed."""
        return (
            self.victim.poll() is None
            and self.file.read_bytes() == b"bait"
            and not any(_arrived(listener) for listener in self.listeners)
        )


@contextmanager
def _bait(identity: Identity) -> Iterator[_Bait]:
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="asap-probe-")))
        folder.chmod(0o755)
        file = folder / "bait"
        file.write_bytes(b"bait")
        file.chmod(0o666)
        tcp = held.enter_context(socket.create_server(("127.0.0.1", 0)))
        udp = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        abstract = held.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind("")  # the kernel picks a free abstract name
        abstract.listen()
        for listener in (tcp, udp, abstract):
            listener.setblocking(False)
        # Of the sandbox's own user, so that only the sandbox stands between them.
        user = {} if identity.uid is None else {"user": identity.uid, "group": identity.uid}
        victim = held.enter_context(
            subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL, cwd="/", **user)  # type: ignore[call-overload]
        )
        held.callback(victim.kill)
        facts = {
            "file": str(file),
            "secrets": SECRETS,
            "metadata": METADATA,
            "tcp": tcp.getsockname()[1],
            "udp": udp.getsockname()[1],
            "abstract": abstract.getsockname(),
            "victim": victim.pid,
            "parent": os.getpid(),
            "processes": 2 * LIMITS.processes,
        }
        yield _Bait(facts, victim, (tcp, udp, abstract), file)


def _arrived(listener: socket.socket) -> bool:
    try:
        if listener.type == socket.SOCK_DGRAM:
            return bool(listener.recv(1))
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def self_test(run: Run, identity: Identity, limits: Limits = LIMITS) -> dict[str, str]:
    """Run all probes: name → "" where it was held, else what went wrong."""
    limits = Limits(**{**vars(limits), "cpu_s": LIMITS.cpu_s, "wall_s": LIMITS.wall_s})
    found: dict[str, str] = {}
    with _bait(identity) as bait:
        for name, text in PROBES.items():
            source = PREFIX + text.format(**bait.facts) + f'print("{DONE}")\n'
            (outcome,) = run((Program(source=source),), limits)
            found[name] = _complaint(name, outcome)
            if not found[name] and not bait.untouched():
                found[name] = "the bait was touched"
    return found


def _complaint(name: str, outcome: Outcome) -> str:
    if outcome.trouble:
        return outcome.trouble
    lines = outcome.stdout.decode(errors="replace").split()
    if GOT in lines:
        return "it succeeded"
    if name == "memory" and outcome.stop == "memory":
        return ""
    stderr = outcome.stderr[-200:].decode(errors="replace")
    # A probe that broke proves nothing.
    return "" if DONE in lines else f"the probe broke: {stderr}"
