"""Both launchers keep the same promises: processes of this machine, and Jobs of a cluster."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from asap.errors import Conflict
from asap.runs import Launch
from asap_trainer.kubernetes_jobs import KubernetesLauncher
from asap_trainer.launcher import Launcher, Status, launch_name
from asap_trainer.local import LocalLauncher
from kubernetes_server import KubernetesServer
from training_program import (
    SECRET,
    Program,
    cluster_settings,
    dead,
    idle,
    local_settings,
    train_run,
    until,
)


@dataclass
class Place:
    """Where the program is launched; `launcher` makes one more worker's, and `overdue` passes the
    time of hours that a launch, by its name, has at most.
    """

    kind: str
    program: Program
    make: Callable[..., Launcher]
    overdue: Callable[[str], None]

    def launcher(self, **trainer) -> Launcher:
        return self.make(**trainer)


@pytest.fixture(params=["subprocess", "kubernetes"])
async def place(request, tmp_path):
    program = Program.made(tmp_path / "program")
    if request.param == "subprocess":

        def make(**trainer):
            return LocalLauncher(local_settings(tmp_path, program.python, **trainer))

        def overdue(name):
            os.utime(tmp_path / "work" / name / "pid", (0, 0))

        yield Place(request.param, program, make, overdue)
    else:
        async with KubernetesServer(tmp_path / "cluster", python=program.python) as cluster:

            def make(**trainer):
                return KubernetesLauncher(cluster_settings(tmp_path, cluster.kubeconfig, **trainer))

            yield Place(request.param, program, make, cluster.overdue)
    program.kill()


async def test_a_run_is_carried_out_by_the_training_command(place):
    launcher = place.launcher()
    await launcher.check()
    launch = await launcher.launch(train_run(), 0)
    assert launch == Launch(launcher=place.kind, name=launch_name(train_run().id, 0), attempt=0)
    assert (await until(launcher, launch, "running")).exit_code is None
    [start] = await place.program.begun(1)
    assert start["arguments"] == ["-m", "asap_trainer.train", "--run", train_run().prefix]
    assert start["env"]["ASAP_TELEMETRY__LOG_JSON"] == "true"
    place.program.end(0)
    assert await until(launcher, launch, "succeeded") == Status("succeeded", exit_code=0)


@pytest.mark.parametrize(
    ("code", "phase", "reason"),
    [
        (1, "failed", "crashed"),
        (78, "failed", "refused"),
        (137, "failed", "out-of-memory"),
        (143, "evicted", "stopped"),
    ],
)
async def test_an_exit_code_says_how_it_ended(place, code, phase, reason):
    launcher = place.launcher()
    place.program.end(code)
    status = await until(launcher, await launcher.launch(train_run(), 0), phase)
    assert (status.reason, status.exit_code) == (reason, code)


async def test_a_failure_shows_only_what_the_process_logged(place):
    launcher = place.launcher()
    place.program.end(1)
    status = await until(launcher, await launcher.launch(train_run(), 0), "failed")
    assert len(status.log) == 1
    assert '"train.began"' in status.log[0]
    assert SECRET not in "".join(status.log)


async def test_a_launch_that_is_repeated_adopts_the_first(place):
    launches = [await place.launcher().launch(train_run(), 0) for _ in range(2)]
    assert launches[0] == launches[1]
    [start] = await place.program.begun(1)
    later = place.launcher()
    assert (await until(later, launches[0], "running")).phase == "running"
    place.program.end(0)
    await until(later, launches[0], "succeeded")
    assert place.program.starts == [start]


async def test_launches_at_the_same_moment_start_one_process(place):
    workers = [place.launcher() for _ in range(4)]
    launches = await asyncio.gather(*(worker.launch(train_run(), 0) for worker in workers))
    assert len(set(launches)) == 1
    place.program.end(0)
    await until(workers[0], launches[0], "succeeded")
    assert len(place.program.starts) == 1


async def test_a_name_that_is_somebody_elses_is_left_alone(place):
    await place.launcher().launch(train_run(), 0)
    with pytest.raises(Conflict):
        await place.launcher().launch(train_run(tenant="other"), 0)
    assert len(await place.program.begun(1)) == 1


async def test_attempts_are_launches_of_their_own(place):
    launcher = place.launcher()
    place.program.end(143)
    first = await launcher.launch(train_run(), 0)
    await until(launcher, first, "evicted")
    place.program.go_on()
    second = await launcher.launch(train_run(), 1)
    await until(launcher, second, "running")
    assert (await launcher.look(first)).phase == "evicted"


async def test_what_was_never_launched_is_gone(place):
    launch = Launch(launcher=place.kind, name=launch_name(train_run().id, 0), attempt=0)
    assert await place.launcher().look(launch) == Status("gone")
    await place.launcher().stop(launch)


async def test_what_works_is_listed_until_it_ends_whoever_launched_it(place):
    assert await place.launcher().launched() == []
    launches = [await place.launcher(concurrency=2).launch(train_run(n), 3) for n in (1, 2)]
    await place.program.begun(2)
    assert sorted(await place.launcher().launched(), key=lambda one: one.name) == launches
    place.program.end(0)
    for launch in launches:
        await until(place.launcher(), launch, "succeeded")
    await idle(place.launcher())


async def test_a_stopped_run_ends_with_all_its_processes(place):
    launcher = place.launcher()
    launch = await launcher.launch(train_run(), 0)
    [start] = await place.program.begun(1)
    await launcher.stop(launch)
    await dead(start["pid"], start["child"])
    await until(launcher, launch, "evicted", "gone")
    await idle(launcher)
    await launcher.stop(launch)


async def test_a_run_that_takes_too_long_is_stopped_and_has_failed(place):
    launcher = place.launcher(max_hours=2)
    launch = await launcher.launch(train_run(), 0)
    [start] = await place.program.begun(1)
    place.overdue(launch.name)
    status = await until(launcher, launch, "failed")
    assert status.reason == "deadline"
    await dead(start["pid"], start["child"])
