from __future__ import annotations

import pytest

from asap.config import PruneConfig
from asap.errors import Misconfigured
from asap.types import Record, Triple
from asap_cli.journal import Journal, content_key


def record(i=0, **config):
    triple = Triple(id=str(i), question="q", cot="a\n\nb", answer="ä", meta={})
    return Record(triple=triple, config=PruneConfig(**config))


def test_records_come_back_and_a_cut_line_is_dropped(tmp_path):
    journal = Journal(tmp_path / "j")
    keys = [content_key(record(i), "engines") for i in range(3)]
    for i, key in enumerate(keys):
        journal.append(key, record(i))
    assert journal[keys[1]] == record(1)
    journal.close(delete=False)
    with (tmp_path / "j").open("r+b") as stream:
        stream.truncate((tmp_path / "j").stat().st_size - 5)
    again = Journal(tmp_path / "j")
    assert (again.resumed, len(again)) == (2, 2)
    assert keys[2] not in again
    again.append(keys[2], record(2))
    assert [again[key] for key in keys] == [record(i) for i in range(3)]
    again.close(delete=True)
    assert list(tmp_path.iterdir()) == []


def test_the_key_follows_content_configuration_and_engines():
    base = content_key(record(), "scorer demo")
    assert content_key(record(), "scorer demo") == base
    assert content_key(record(1), "scorer demo") != base
    assert content_key(record(max_tokens=5), "scorer demo") != base
    assert content_key(record(), "scorer other") != base


def test_two_runs_never_share_a_journal(tmp_path):
    first = Journal(tmp_path / "j")
    with pytest.raises(Misconfigured, match="another run"):
        Journal(tmp_path / "j")
    first.close(delete=False)
    Journal(tmp_path / "j").close(delete=True)
