from __future__ import annotations

from asap_anchor.batch_ledger import BatchLedger, OpenBatch


def test_what_is_put_is_found_until_it_is_dropped(tmp_path):
    ledger = BatchLedger(tmp_path)
    assert ledger.batches() == []
    batch = OpenBatch(input_file="file-1/../x", keys=("a", "b"))
    ledger.put(batch)
    known = batch.model_copy(update={"batch": "batch-1"})
    ledger.put(known)
    ledger.put(OpenBatch(input_file="file-2", keys=("c",)))
    assert BatchLedger(tmp_path).batches() == [known, OpenBatch(input_file="file-2", keys=("c",))]
    ledger.drop(known)
    ledger.drop(known)
    assert [b.input_file for b in ledger.batches()] == ["file-2"]
    assert {path.parent for path in tmp_path.rglob("*.json")} == {tmp_path / "open"}


def test_foreign_and_damaged_files_are_left_alone(tmp_path):
    ledger = BatchLedger(tmp_path)
    ledger.put(OpenBatch(input_file="file-1", keys=("a",)))
    (tmp_path / "open" / "x.json").write_text('{"format": 2}')
    (tmp_path / "open" / "y.json").write_text("{")
    assert len(ledger.batches()) == 1


def test_a_reply_is_booked_once(tmp_path):
    one, other = BatchLedger(tmp_path), BatchLedger(tmp_path)
    assert not one.book("a")
    one.arrived("a")
    assert other.book("a")
    assert not one.book("a")
