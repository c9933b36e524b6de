"""The registry of models, on every database."""

from __future__ import annotations

import pytest

from asap.errors import Conflict, InvalidInput, NotFound
from asap_runtime.models import ModelRegistry, parse_reference
from job_store import TENANT, a_model, annotate, promote, register


@pytest.fixture
def registry(database):
    return ModelRegistry(database)


def job(number):
    return f"{number:032x}"


def references(found):
    return [model.reference for model in found]


def test_versions_count_from_one_for_each_name_and_tenant(registry):
    given = [a_model(registry, name, job(n)) for n, name in enumerate(["x", "x", "y", "x"])]
    theirs = a_model(registry, "x", job(9), tenant="b")
    assert references(given) == ["x@1", "x@2", "y@1", "x@3"]
    assert theirs.reference == "x@1"
    stored = registry.get(TENANT, "x", 2)
    assert stored == given[1]
    assert (stored.stage, stored.base, stored.job_id) == ("none", "demo", job(1))
    assert stored.prefix == f"{TENANT}/runs/{job(1)}/model"
    assert stored.meta == {"held_out_loss_after": 0.5}


def test_a_job_has_one_model_however_often_it_is_added(registry):
    first = a_model(registry, "x", job(1))
    a_model(registry, "x", job(2))
    assert a_model(registry, "x", job(1)) == first
    assert len(registry.list(TENANT)) == 2
    registry.remove(TENANT, "x", 1)
    assert a_model(registry, "x", job(1)).version == 1
    assert references(registry.list(TENANT)) == ["x@2"], "and what was removed does not come back"


def test_of_the_processes_that_race_each_gets_its_own_number(registry, database_url, racers):
    jobs = [[job(10 * process + n) for n in range(5)] for process in range(4)]
    runs = [racers.submit(register, database_url, "x", of_one) for of_one in jobs]
    versions = [version for run in runs for version in run.result()]
    assert sorted(versions) == list(range(1, 21))


def test_of_the_processes_that_add_the_same_job_all_get_one_version(registry, database_url, racers):
    runs = [racers.submit(register, database_url, "x", [job(1)]) for _ in range(4)]
    assert [run.result() for run in runs] == [[1]] * 4
    assert len(registry.list(TENANT)) == 1


def test_a_name_stands_for_production_else_for_the_newest(registry):
    for n in range(3):
        a_model(registry, "x", job(n))
    assert registry.get(TENANT, "x").version == 3
    registry.set_stage(TENANT, "x", 2, "staging")
    assert registry.get(TENANT, "x").version == 3
    assert registry.set_stage(TENANT, "x", 1, "production").stage == "production"
    assert registry.get(TENANT, "x").version == 1
    registry.set_stage(TENANT, "x", 1, "none")
    assert registry.get(TENANT, "x").version == 3


def test_one_version_of_a_name_is_in_production(registry):
    for n in range(2):
        a_model(registry, "x", job(n))
        a_model(registry, "y", job(10 + n))
    a_model(registry, "x", job(20), tenant="b")
    registry.set_stage(TENANT, "y", 1, "production")
    registry.set_stage("b", "x", 1, "production")
    for version in (1, 2, 2):
        registry.set_stage(TENANT, "x", version, "production")
    stages = {model.reference: model.stage for model in registry.list(TENANT)}
    assert stages == {"x@2": "production", "x@1": "none", "y@2": "none", "y@1": "production"}
    assert registry.get("b", "x").stage == "production"


def test_a_promotion_that_fails_leaves_the_one_in_production(registry):
    a_model(registry, "x", job(1))
    registry.set_stage(TENANT, "x", 1, "production")
    for version in (2, 0):
        with pytest.raises(NotFound):
            registry.set_stage(TENANT, "x", version, "production")
    assert registry.get(TENANT, "x", 1).stage == "production"


def test_promotions_that_race_leave_one_in_production(registry, database_url, racers):
    for n in range(4):
        a_model(registry, "x", job(n))
    runs = [racers.submit(promote, database_url, "x", [n + 1] * 10) for n in range(4)]
    for run in runs:
        run.result()
    stages = [model.stage for model in registry.list(TENANT, name="x")]
    assert sorted(stages) == ["none", "none", "none", "production"]


def test_a_removed_version_is_gone_and_its_number_with_it(registry):
    for n in range(2):
        a_model(registry, "x", job(n))
    assert registry.remove(TENANT, "x", 2).reference == "x@2"
    for act in (registry.get, registry.remove, lambda *a: registry.set_stage(*a, "staging")):
        with pytest.raises(NotFound):
            act(TENANT, "x", 2)
    assert registry.of_job(TENANT, job(1)) is None
    assert registry.get(TENANT, "x").version == 1
    assert a_model(registry, "x", job(5)).version == 3


def test_what_is_in_production_is_not_removed(registry):
    a_model(registry, "x", job(1))
    registry.set_stage(TENANT, "x", 1, "production")
    with pytest.raises(Conflict) as caught:
        registry.remove(TENANT, "x", 1)
    assert caught.value.problem_code == "model-in-production"
    assert registry.get(TENANT, "x").stage == "production"


def test_pages_have_every_version_once_by_name_and_newest_first(registry):
    for n in range(12):
        a_model(registry, "xyz"[n % 3], job(n))
    a_model(registry, "x", job(90), tenant="b")
    pages, seen, cursor = [], [], None
    while found := registry.list(TENANT, cursor=cursor, limit=5):
        pages.append(len(found))
        seen += references(found)
        cursor = found[-1].reference
    assert pages == [5, 5, 2]
    assert seen == [f"{name}@{n}" for name in "xyz" for n in (4, 3, 2, 1)]
    assert references(registry.list(TENANT, name="y", cursor="y@3")) == ["y@2", "y@1"]
    with pytest.raises(InvalidInput):
        registry.list(TENANT, cursor="nonsense")


def test_another_tenants_model_does_not_exist(registry):
    a_model(registry, "x", job(1))
    assert registry.list("b") == []
    assert registry.of_job("b", job(1)) is None
    for act in (
        lambda: registry.get("b", "x"),
        lambda: registry.get("b", "x", 1),
        lambda: registry.set_stage("b", "x", 1, "production"),
        lambda: registry.remove("b", "x", 1),
    ):
        with pytest.raises(NotFound):
            act()
    assert registry.get(TENANT, "x", 1).stage == "none"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("coder@3", ("coder", 3)),
        ("a.b-c_d@12", ("a.b-c_d", 12)),
        ("coder", None),
        ("coder@0", None),
        ("coder@latest", None),
        ("Qwen/Qwen2.5-7B", None),
        ("Qwen/Qwen2.5@1", None),
        ("/models/coder@3", None),
    ],
)
def test_a_reference_is_a_name_with_a_version(text, expected):
    assert parse_reference(text) == expected


def test_figures_are_added_to_a_version_and_the_others_stay(registry):
    for job_id, tenant in ((job(1), TENANT), (job(2), TENANT), (job(3), "b")):
        a_model(registry, "x", job_id, tenant)
    first = {"tokens": 7.5}
    registry.annotate(TENANT, "x", 1, "evaluation:a@1", first)
    changed = registry.annotate(TENANT, "x", 1, "evaluation:a@1", {"tokens": 8.0})
    both = registry.annotate(TENANT, "x", 1, "evaluation:b@1", first)
    assert changed.meta == {"held_out_loss_after": 0.5, "evaluation:a@1": {"tokens": 8.0}}
    assert both.meta == {**changed.meta, "evaluation:b@1": first}
    assert registry.get(TENANT, "x", 1) == both
    for tenant, version in ((TENANT, 2), ("b", 1)):
        assert registry.get(tenant, "x", version).meta == {"held_out_loss_after": 0.5}
    registry.remove(TENANT, "x", 2)
    for tenant, name, version in ((TENANT, "x", 2), (TENANT, "y", 1), ("c", "x", 1)):
        with pytest.raises(NotFound):
            registry.annotate(tenant, name, version, "k", 1)


def test_figures_that_are_added_at_once_are_all_there(registry, database_url, racers):
    a_model(registry, "x", job(1))
    keys = [[f"{process}.{n}" for n in range(5)] for process in range(4)]
    runs = [racers.submit(annotate, database_url, "x", of_one) for of_one in keys]
    for run in runs:
        run.result()
    meta = registry.get(TENANT, "x", 1).meta
    assert set(meta) == {"held_out_loss_after", *(key for of_one in keys for key in of_one)}
