"""oneDNN's product is torch's own up to rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from asap_surprisal.products import linear, use_onednn


@pytest.mark.parametrize("shape", [(70, 33), (2, 5, 33), (33,), (0, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_torch(shape, dtype):
    states, weight, bias = (torch.randn(size).to(dtype) for size in (shape, (9, 33), (9,)))
    for given in (None, bias):
        expected = nn.functional.linear(states, weight, given)
        found = linear(states, weight, given)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected)


def test_operands_need_not_lie_in_one_piece():
    states, weight = torch.randn(33, 70).T, torch.randn(33, 18).T[::2]
    torch.testing.assert_close(linear(states, weight), states @ weight.T)


def test_a_model_keeps_its_weights_and_its_other_layers():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Scaled(8, 2))
    before, states = dict(model.named_parameters()), torch.randn(3, 4)
    expected = model(states)
    use_onednn(model)
    torch.testing.assert_close(model(states), expected)
    assert all(part is before[name] for name, part in model.named_parameters())
    assert type(model[0]) is not nn.Linear
    assert type(model[2]) is Scaled
