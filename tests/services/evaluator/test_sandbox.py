from __future__ import annotations

import os

import pytest

from asap.errors import CapacityError
from asap_evaluator import sandbox as module
from asap_evaluator.isolation import Identity, Limits, Program
from asap_evaluator.sandbox import Sandbox, physical_cores
from waiting import PATIENCE_S


class Level:
    def __init__(self, name):
        self.name = name


@pytest.fixture
def levels(monkeypatch):
    """Levels by name → complaint of their self-test; nothing is started."""
    complaints: dict[str, str] = {}
    monkeypatch.setattr(module, "_open_level", lambda name, folder, identity: Level(name))
    monkeypatch.setattr(module, "_temporary_root", lambda held: None)
    monkeypatch.setattr(module, "_runner", lambda level, identity: level)
    monkeypatch.setattr(module, "calibrate", lambda run, limits, reference_cpu_s: 1.0)
    monkeypatch.setattr(
        module, "self_test", lambda level, identity, limits: {"TCP": complaints[level.name]}
    )
    return complaints


def test_the_best_level_that_holds_is_taken(levels):
    levels |= {"namespaces": "", "landlock": ""}
    assert Sandbox.open().level.name == "namespaces"
    levels["namespaces"] = "it succeeded"
    assert Sandbox.open().facts["level"] == "landlock"


def test_a_level_below_the_least_is_not_tried(levels):
    levels |= {"namespaces": "it succeeded", "landlock": ""}
    with pytest.raises(CapacityError, match="TCP: it succeeded") as caught:
        Sandbox.open(least="namespaces")
    assert caught.value.problem_code == "sandbox-unavailable"


def test_without_any_level_nothing_is_run(levels):
    levels |= {"namespaces": "it succeeded", "landlock": "the probe broke"}
    with pytest.raises(CapacityError, match="no sandbox holds here"):
        Sandbox.open()


def test_root_without_an_ordinary_user_is_refused(monkeypatch):
    monkeypatch.setattr(module.os, "geteuid", lambda: 0)
    with pytest.raises(CapacityError, match="system user"):
        Sandbox.open(uid=0)
    assert module._ordinary_user(1000) == Identity(1000)
    monkeypatch.setattr(module.os, "geteuid", lambda: 1000)
    assert module._ordinary_user(0) == Identity()


def test_too_little_memory_for_the_concurrency_is_refused():
    with pytest.raises(CapacityError, match="free memory"):
        Sandbox.open(limits=Limits(memory_bytes=2**50))


def test_cores_are_counted():
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)


@pytest.mark.contract
def test_programs_never_run_as_root(sandbox):
    program = Program(source="import os; print(os.getuid())")
    (outcome,) = sandbox.run([program], Limits(wall_s=PATIENCE_S))
    assert int(outcome.stdout) >= 1000


@pytest.mark.contract
def test_the_facts_name_level_kernel_and_limits(sandbox):
    assert sandbox.facts["level"] == sandbox.level.name
    assert {"kernel", "python", "speed", "memory_bytes", "processes"} <= sandbox.facts.keys()
