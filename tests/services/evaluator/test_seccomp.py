from __future__ import annotations

import pytest

from asap_evaluator.isolation import Limits, Program
from asap_evaluator.seccomp import filter_bpf
from waiting import PATIENCE_S

REFUSED = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
def code(call, *args):
    return errno.errorcode[ctypes.get_errno()] if call(*args) < 0 else "allowed"
print(code(libc.unshare, 0x10000000), code(libc.ptrace, 0, 0, 0, 0))
print(code(libc.mount, 0, 0, 0, 0, 0))
print(code(libc.syscall, 435, 0, 0), code(libc.syscall, 457, 0, 0), code(libc.socket, 2, 1, 0))
"""
NEIGHBOURS = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
print(libc.chmod(b"/tmp", 0o777), libc.shmget(1, 4096, 0o1600), libc.socket(1, 1, 0))
print(libc.socketpair(1, 2, 0, (ctypes.c_int * 2)()), socket.socketpair()[0].fileno() > 0)
"""


def printed(sandbox, source):
    (outcome,) = sandbox.run([Program(source=source)], Limits(wall_s=PATIENCE_S))
    assert outcome.trouble is None
    return outcome.stdout.decode().split()


def test_filters_are_whole_instructions_and_the_lonely_one_is_longer():
    plain, alone = filter_bpf(alone=False), filter_bpf(alone=True)
    assert len(plain) % 8 == 0
    assert len(alone) > len(plain) > 400


@pytest.mark.contract
def test_calls_that_attack_the_kernel_are_refused(sandbox):
    assert printed(sandbox, REFUSED) == [
        "EPERM",
        "EPERM",
        "EPERM",
        "ENOSYS",
        "EPERM",
        "EAFNOSUPPORT",
    ]


@pytest.mark.contract
def test_without_namespaces_shared_state_is_refused_too(landlock):
    assert printed(landlock, NEIGHBOURS) == ["-1", "-1", "-1", "-1", "True"]


@pytest.mark.contract
def test_ordinary_concurrency_works(namespaces):
    source = """
import asyncio, multiprocessing, threading
def work(n): return n * n
thread = threading.Thread(target=work, args=(1,)); thread.start(); thread.join()
async def main(): return await asyncio.to_thread(work, 2)
print(asyncio.run(main()))
with multiprocessing.get_context("fork").Pool(2) as pool: print(sum(pool.map(work, range(4))))
"""
    assert printed(namespaces, source) == ["4", "14"]
