"""Linear layers through oneDNN against torch's own."""

import pytest
import torch
from torch import nn

from steersman.serving.linear import FrozenLinear, available, speed_up


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (5, 8), (3, 5, 8), (0, 8)])
@torch.inference_mode()
def test_the_product_is_that_of_torch(shape, bias):
    torch.manual_seed(0)
    layer = nn.Linear(8, 6, bias=bias)
    input = torch.randn(shape)
    expected = layer(input)
    assert speed_up(layer) == int(available())
    torch.testing.assert_close(layer(input), expected, atol=1e-6, rtol=1e-5)


def test_only_plain_float32_layers_are_changed_and_their_names_stay():
    class Other(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Other(4, 4), nn.Linear(4, 4).bfloat16())
    names = list(model.state_dict())
    assert speed_up(model) == int(available())
    assert [type(layer) for layer in model[1:]] == [Other, nn.Linear]
    assert list(model.state_dict()) == names


def test_a_gradient_that_is_asked_for_is_computed_as_before():
    layer = nn.Linear(4, 2)
    speed_up(layer)
    input = torch.randn(3, 4, requires_grad=True)
    layer(input).sum().backward()
    assert input.grad is not None
    assert isinstance(layer, FrozenLinear) or not available()
