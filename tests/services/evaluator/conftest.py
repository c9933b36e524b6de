"""Real sandboxes, opened once: both levels where this machine has them."""

from __future__ import annotations

import pytest

from asap.errors import CapacityError
from asap_evaluator.sandbox import Sandbox


def opened(name):
    try:
        return Sandbox.open(least=name, levels=(name,), reference_cpu_s=10.0)
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
