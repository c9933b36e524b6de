from __future__ import annotations

import pytest

from asap.errors import InvalidInput, Misconfigured
from asap_evaluator.settings import EvaluatorSettings, check_model
from asap_runtime.settings import load_settings, redacted


def test_the_defaults_are_a_server_of_our_own_and_any_level_that_holds(tmp_path):
    settings = EvaluatorSettings(home=tmp_path)
    assert settings.evaluator.base_url is None
    assert settings.evaluator.sandbox_min_level == "landlock"
    assert settings.evaluator.vllm.dtype == "bfloat16"
    assert settings.evaluator.vllm.gpu_memory_utilization == 0.9
    assert settings.evaluator_dir == tmp_path / "evaluator"


def test_settings_come_from_the_environment_and_keys_stay_hidden(monkeypatch, tmp_path):
    monkeypatch.setenv("ASAP_EVALUATOR__BASE_URL", "http://vllm:8000/v1")
    monkeypatch.setenv("ASAP_EVALUATOR__API_KEY", "sesame")
    monkeypatch.setenv("ASAP_EVALUATOR__SANDBOX_MIN_LEVEL", "namespaces")
    monkeypatch.setenv("ASAP_EVALUATOR__WORK_DIR", str(tmp_path))
    settings = load_settings(EvaluatorSettings)
    assert settings.evaluator.base_url == "http://vllm:8000/v1"
    assert settings.evaluator.sandbox_min_level == "namespaces"
    assert settings.evaluator_dir == tmp_path
    assert "sesame" not in str(redacted(settings))


def test_settings_of_vllm_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("ASAP_EVALUATOR__VLLM__MAX_MODEL_LEN", "12288")
    monkeypatch.setenv("ASAP_EVALUATOR__VLLM__ARGS", '["--tensor-parallel-size=2"]')
    vllm = load_settings(EvaluatorSettings).evaluator.vllm
    assert vllm.max_model_len == 12288
    assert vllm.args == ("--tensor-parallel-size=2",)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"served_model": "m"}, "served_model"),
        ({"tokenizer": "m"}, "tokenizer"),
        ({"api_key": "k"}, "api_key"),
        ({"base_url": "http://h:1/v1", "vllm": {"max_model_len": 4096}}, "vllm"),
        ({"sandbox_uid": 0}, "greater than or equal to 1000"),
        ({"sandbox_min_level": "none"}, "namespaces"),
        ({"request_timeout_s": 2000}, "1700"),
    ],
)
def test_what_cannot_work_or_would_change_nothing_is_refused(values, name):
    with pytest.raises(Misconfigured, match=name):
        load_settings(EvaluatorSettings, evaluator=values)


@pytest.mark.parametrize("model", ["demo", "mine@3", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"])
def test_names_are_allowed(model):
    check_model(model, None)


def test_paths_are_allowed_inside_of_one_folder_only(tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    check_model(str(models / "mine"), models)
    (models / "way-out").symlink_to(tmp_path)
    refused = [models.parent, models / ".." / "secret", models / "way-out" / "x", "/etc", "./mine"]
    for path in refused:
        with pytest.raises(InvalidInput) as caught:
            check_model(str(path), models)
        assert caught.value.context["errors"][0]["pointer"] == "/model"
    with pytest.raises(InvalidInput):
        check_model(str(models / "mine"), None)
