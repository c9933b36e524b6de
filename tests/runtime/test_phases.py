from __future__ import annotations

import pytest

from asap_runtime.phases import JobFacts, StageCount, count_of, phase

QUEUED, RUNNING = StageCount("one", "queued", 2), StageCount("one", "running", 1)
LATER = StageCount("two", "queued", 3)
SUCCEEDED, FAILED = StageCount("two", "succeeded", 4), StageCount("two", "failed", 1)


@pytest.mark.parametrize(
    ("facts", "counts", "expected"),
    [
        ({}, [], "validating"),
        ({}, [QUEUED], "validating"),
        ({"rejected_at": 5}, [QUEUED], "rejected"),
        ({"rejected_at": 5, "finished_at": 6}, [], "rejected"),
        ({"ingested_at": 5}, [QUEUED], "queued"),
        ({"ingested_at": 5}, [QUEUED, RUNNING], "running"),
        ({"ingested_at": 5}, [QUEUED, SUCCEEDED], "running"),
        ({"ingested_at": 5}, [LATER, FAILED], "running"),
        ({"ingested_at": 5}, [SUCCEEDED, FAILED], "finalizing"),
        ({"ingested_at": 5}, [], "finalizing"),
        ({"ingested_at": 5, "finished_at": 9}, [SUCCEEDED], "done"),
        ({"ingested_at": 5, "finished_at": 9}, [FAILED], "done"),
        ({"ingested_at": 5, "cancelled_at": 6}, [QUEUED, RUNNING], "cancelling"),
        ({"ingested_at": 5, "cancelled_at": 6}, [QUEUED], "cancelled"),
        ({"cancelled_at": 6}, [], "cancelled"),
        ({"ingested_at": 5, "cancelled_at": 6, "finished_at": 7}, [SUCCEEDED], "cancelled"),
        ({"ingested_at": 5, "expires_at": 50}, [RUNNING], "expired"),
        ({"ingested_at": 5, "expires_at": 200}, [RUNNING], "running"),
        ({"ingested_at": 5, "expires_at": 50, "finished_at": 40}, [SUCCEEDED], "done"),
        ({"ingested_at": 5, "expires_at": 50, "finished_at": 60}, [FAILED], "expired"),
    ],
)
def test_the_phase_is_a_table(facts, counts, expected):
    assert phase(JobFacts(created_at=1, now=100, **facts), counts) == expected


def test_counts_add_up_over_stages():
    assert count_of([QUEUED, LATER, RUNNING], "queued") == 5
    assert count_of([QUEUED, RUNNING, FAILED], "running", "failed") == 2
    assert count_of([], "queued") == 0
