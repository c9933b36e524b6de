from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asap_runtime.values import Claimed, Due, ItemProblem, pack, unpack


@given(st.binary())
def test_a_payload_comes_back_byte_for_byte(payload):
    assert unpack(pack(payload)) == payload


def test_payloads_are_stored_compressed():
    assert len(pack(b'{"step": "the same words again"}' * 100)) < 200


@given(st.text(), st.dictionaries(st.text(), st.none() | st.integers() | st.text(), max_size=3))
def test_a_problem_survives_storage(detail, context):
    """Also with NUL and lone surrogates, which a text column of PostgreSQL refuses."""
    problem = ItemProblem("internal-error", detail, context)
    assert problem.to_json().isascii()
    assert "\x00" not in problem.to_json()
    assert ItemProblem.from_json(problem.to_json()) == problem


def test_a_claim_names_its_next_message():
    claim = Claimed(7, "job", 0, "one", 0, 3, "worker", 5, b"{}", None)
    assert claim.due() == Due(id=7, priority=5, fence=3)
