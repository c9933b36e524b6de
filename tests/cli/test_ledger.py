from __future__ import annotations

from asap.errors import InvalidInput
from asap.types import Triple
from asap_cli.ledger import Rejected, ledger_path, write_ledger
from fakes import rows


def test_entries_are_sorted_by_line_and_an_empty_ledger_is_no_file(tmp_path):
    out = tmp_path / "out.jsonl"
    triple = Triple(id="x", question="q", cot="c", answer="a")
    late = Rejected.of(7, InvalidInput("bad", code="malformed-json"))
    early = Rejected.of(2, InvalidInput("worse"), triple)
    write_ledger(out, [late, early])
    assert rows(ledger_path(out)) == [
        {"line": 2, "id": "x", "code": "invalid-input", "detail": "worse"},
        {"line": 7, "id": None, "code": "malformed-json", "detail": "bad"},
    ]
    write_ledger(out, [])
    assert not ledger_path(out).exists()
