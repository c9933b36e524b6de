"""Real sandboxes, opened once: both levels where this machine has them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from asap.errors import CapacityError
from asap_evaluator import probes
from asap_evaluator.isolation import Limits
from asap_evaluator.sandbox import Sandbox
from waiting import PATIENCE_S


@pytest.fixture(scope="session", autouse=True)
def patient_probes():
    """No level is refused because a probe had to wait for its turn on a busy machine."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(probes, "LIMITS", replace(probes.LIMITS, wall_s=PATIENCE_S))
        yield


def opened(name):
    limits = Limits(wall_s=PATIENCE_S)  # of the calibration; each problem has limits of its own
    try:
        return Sandbox.open(least=name, levels=(name,), limits=limits, reference_cpu_s=10.0)
    except CapacityError as error:
        pytest.skip(error.detail)


@pytest.fixture(scope="session")
def namespaces():
    sandbox = opened("namespaces")
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="session")
def landlock():
    sandbox = opened("landlock")
    yield sandbox
    sandbox.close()


@pytest.fixture(params=["namespaces", "landlock"])
def sandbox(request):
    """Each level."""
    return request.getfixturevalue(request.param)
