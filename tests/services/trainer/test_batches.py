"""Rows, data set and batches: every token arrives where it belongs."""

from __future__ import annotations

import pytest

from asap.sft import IGNORED, SftExample
from asap_trainer.batches import collate, collate_packed, dataset_of, rows_of, total_steps

EXAMPLES = [
    SftExample("a", (5, 6, 7), (IGNORED, 6, 7)),
    SftExample("b", (8, 0, 1, 1), (IGNORED, IGNORED, 1, 1)),
    SftExample("c", (9, 2), (9, 2)),
]


def test_a_row_is_a_sample_unless_packed():
    assert rows_of([3, 4, 2], 8, packing=False) == [[0], [1], [2]]
    packed = rows_of([3, 4, 2], 8, packing=True)
    assert sorted(index for row in packed for index in row) == [0, 1, 2]
    assert len(packed) == 2


def test_the_data_set_puts_rows_together_when_asked():
    rows = dataset_of(EXAMPLES, [[1], [0]])
    assert len(rows) == 2
    assert rows[0] == {"input_ids": [8, 0, 1, 1], "labels": [IGNORED, IGNORED, 1, 1]}
    packed = dataset_of(EXAMPLES, [[0, 2]])[0]
    assert packed["input_ids"] == [5, 6, 7, 9, 2]
    assert packed["labels"] == [IGNORED, 6, 7, IGNORED, 2]
    assert packed["position_ids"] == [0, 1, 2, 0, 1]


def test_the_data_set_is_not_hashed_by_its_tokens():
    class Guarded(list):
        def __reduce__(self):
            raise AssertionError("the samples were pickled")

    assert len(dataset_of(Guarded(EXAMPLES), [[0]])) == 1


def test_padding_carries_no_loss_and_no_attention():
    batch = collate([dict(dataset_of(EXAMPLES, [[n]])[0]) for n in range(2)])
    assert batch["input_ids"].tolist()[0][:3] == [5, 6, 7]
    assert batch["labels"].tolist() == [
        [IGNORED, 6, 7, IGNORED],
        [IGNORED, IGNORED, 1, 1],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_packed_rows_stand_one_behind_the_other_without_padding():
    rows = dataset_of(EXAMPLES, [[0, 2], [1, 2]])
    batch = collate_packed([rows[0], rows[1]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9, 2, 8, 0, 1, 1, 9, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 1]]
    assert "attention_mask" not in batch


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs", "steps"),
    [
        (5000, 1, 16, 10, 3130),  # 312.5 steps an epoch, and the half one is a step
        (16, 1, 16, 1, 1),
        (17, 1, 16, 1, 2),
        (10, 3, 2, 1, 2),
        (10, 1, 2, 0.5, 3),
    ],
)
def test_an_epoch_ends_with_a_step(rows, batch, accumulation, epochs, steps):
    assert steps == total_steps(
        rows, batch=batch, accumulation=accumulation, epochs=epochs, max_steps=None
    )


def test_max_steps_win_over_epochs():
    assert total_steps(100, batch=1, accumulation=1, epochs=9, max_steps=7) == 7
