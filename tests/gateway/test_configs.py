from __future__ import annotations

import pytest

from asap.errors import InvalidInput
from asap_gateway.configs import read_config


def test_the_request_goes_over_the_server_and_the_server_over_the_library():
    config = read_config({"seed": 7}, {"seed": 1, "anchor": "extractive"})
    assert (config.seed, config.anchor, config.max_tokens) == (7, "extractive", 4096)


def test_a_target_of_the_request_displaces_the_servers():
    config = read_config({"keep_ratio": 0.5}, {"max_tokens": 4})
    assert (config.max_tokens, config.keep_ratio) == (None, 0.5)
    assert read_config({"keep_ratio": None}, {"max_tokens": 4}).max_tokens == 4


def test_each_wrong_field_is_named_by_a_pointer_and_no_value_is_shown():
    with pytest.raises(InvalidInput) as caught:
        read_config({"tau": 7, "a/b": "planted"}, {})
    errors = caught.value.context["errors"]
    assert {error["pointer"] for error in errors} == {"/config/tau", "/config/a~1b"}
    assert "planted" not in str(errors)


def test_an_unknown_method_is_named():
    with pytest.raises(InvalidInput) as caught:
        read_config({"method": "magic"}, {})
    assert caught.value.problem_code == "unknown-method"
