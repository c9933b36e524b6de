from __future__ import annotations

import pytest

from asap.errors import InvalidInput, Overloaded
from asap_gateway.admission import Admission
from asap_gateway.settings import GatewayLimits
from asap_runtime.host import open_database
from asap_runtime.ledger import JobLedger
from asap_runtime.settings import RuntimeSettings
from job_store import Platform

LIMITS = GatewayLimits(max_inline_triples=8, max_open_items_per_tenant=10, max_backlog=15)


@pytest.fixture
def platform(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    database = open_database(RuntimeSettings(home=tmp_path / "home"))
    yield Platform(database)
    database.close()


@pytest.fixture
def admission(platform):
    """A fresh one counts; the same one remembers its count for a second."""
    return lambda: Admission(JobLedger(platform.database), LIMITS)


def refusal(check):
    with pytest.raises(Overloaded) as caught:
        check()
    assert 1 <= caught.value.context["retry_after_s"] <= 300
    return caught.value.problem_code


def test_a_body_holds_so_many_triples(admission):
    admission().check("a", 8)
    with pytest.raises(InvalidInput) as caught:
        admission().check("a", 9)
    assert caught.value.problem_code == "too-many-items"


def test_a_tenant_may_have_so_many_open_items_and_the_others_are_free(platform, admission):
    platform.job(6, tenant="a")
    admission().check("a", 4)
    assert refusal(lambda: admission().check("a", 5)) == "tenant-quota"
    admission().check("b", 8)


def test_the_whole_system_may_have_so_many_open_items(platform, admission):
    for tenant in "abc":
        platform.job(4, tenant=tenant)
    admission().check("d", 3)
    assert refusal(lambda: admission().check("d", 4)) == "overloaded"


def test_a_job_that_ends_frees_its_share(platform, admission):
    job = platform.job(10, tenant="a")
    assert refusal(lambda: admission().check("a", 1)) == "tenant-quota"
    platform.ledger.cancel("a", job)
    admission().check("a", 1)


def test_a_count_is_used_again_for_a_moment(platform, admission, monkeypatch):
    monkeypatch.setattr("asap_gateway.admission.COUNTED_FOR_S", 3600.0)
    one = admission()
    one.check("a", 1)
    platform.job(10, tenant="a")
    one.check("a", 1)
    assert refusal(lambda: admission().check("a", 1)) == "tenant-quota"
