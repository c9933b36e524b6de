from __future__ import annotations

import pytest

from asap.errors import InvalidInput, Misconfigured
from asap_runtime.settings import load_settings
from asap_trainer.settings import TrainerSettings, check_base

CLUSTER = {"launcher": "kubernetes", "kubernetes": {"image": "asap:1"}}
BUCKET = {"url": "s3://bucket/asap"}


def test_a_laptop_needs_no_settings(tmp_path):
    settings = TrainerSettings(home=tmp_path)
    assert settings.trainer.launcher == "subprocess"
    assert settings.work_dir == tmp_path / "trainer"
    assert settings.trainer.period_s == 2


def test_jobs_are_looked_at_less_often():
    assert TrainerSettings(blobs=BUCKET, trainer=CLUSTER).trainer.period_s == 15
    assert TrainerSettings(trainer={"poll_s": 7}).trainer.period_s == 7


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"blobs": BUCKET, "trainer": {"launcher": "kubernetes"}}, "image"),
        ({"trainer": CLUSTER}, "s3://"),
    ],
)
def test_what_every_job_would_fail_by_is_found_at_the_start(given, missing):
    with pytest.raises(Misconfigured, match=missing):
        load_settings(TrainerSettings, **given)


@pytest.mark.parametrize(
    "wrong", [{"memory": "much"}, {"cpu": "8 cores"}, {"namespace": "Team_A"}, {"volumes": []}]
)
def test_what_the_cluster_would_refuse_is_found_at_the_start(wrong):
    cluster = CLUSTER | {"kubernetes": {"image": "asap:1", **wrong}}
    with pytest.raises(Misconfigured, match="TRAINER__KUBERNETES"):
        load_settings(TrainerSettings, blobs=BUCKET, trainer=cluster)


def test_variables_reach_the_job(monkeypatch):
    monkeypatch.setenv("ASAP_TRAINER__KUBERNETES__NODE_SELECTOR", '{"gpu": "h100"}')
    monkeypatch.setenv("ASAP_TRAINER__KUBERNETES__ENV_SECRETS", '["blob-keys"]')
    cluster = load_settings(TrainerSettings).trainer.kubernetes
    assert cluster.node_selector == {"gpu": "h100"}
    assert cluster.env_secrets == ("blob-keys",)


@pytest.mark.parametrize("base", ["demo", "Qwen/Qwen2.5-0.5B", "small@3", "gpt2"])
def test_names_of_models_are_allowed(base):
    check_base(base, None)


def test_paths_are_allowed_inside_of_one_folder_only(tmp_path):
    models = tmp_path / "models"
    (models / "mine").mkdir(parents=True)
    check_base(str(models / "mine"), models)
    (models / "link").symlink_to(tmp_path)
    outside = ["/etc", str(tmp_path), f"{models}/../secret", f"{models}/link", "./mine", "~/mine"]
    for base in outside:
        with pytest.raises(InvalidInput, match="base model"):
            check_base(base, models)
    with pytest.raises(InvalidInput, match="not allowed"):
        check_base(str(models / "mine"), None)


@pytest.mark.parametrize("base", ["", "a/b/c", "../x", "-rf", "s3://bucket/model", "name@0"])
def test_what_is_no_name_is_refused(base):
    with pytest.raises(InvalidInput):
        check_base(base, None)
