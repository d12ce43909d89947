"""The fast linear layer: the same numbers and gradients as the plain one, and only where it was asked for."""

import copy

import pytest
import torch
from torch import nn

from steersman.trainer.algorithm.products import one_dnn_available
from steersman.trainer.checkpoint.models import load_actor
from steersman.trainer.checkpoint.source import ModelSource
from steersman.trainer.stages.linear import OneDnnLinear, speed_up
from steersman.trainer.stages.placement import place

pytestmark = pytest.mark.skipif(not one_dnn_available(), reason="torch without oneDNN")


@pytest.mark.parametrize("bias", [True, False])
def test_the_fast_linear_layer_is_a_linear_layer(bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(12, 7, bias=bias)
    fast = copy.deepcopy(plain)
    assert speed_up(nn.Sequential(fast)) == 1
    assert list(fast.state_dict()) == list(plain.state_dict())
    inputs = [torch.randn(2, 5, 12, requires_grad=True) for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    outputs = [layer(x) for layer, x in zip((plain, fast), inputs, strict=True)]
    torch.testing.assert_close(outputs[0], outputs[1])
    weight = torch.randn(2, 5, 7)
    for output in outputs:
        (output * weight).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for one, other in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_model_is_sped_up_where_it_is_placed_unless_the_settings_say_no(tiny_model: ModelSource) -> None:
    for fast in (True, False):
        model = place("cpu", "float32").move(load_actor(tiny_model), fast_linear=fast)
        assert any(isinstance(layer, OneDnnLinear) for layer in model.modules()) is fast


def test_other_types_and_empty_inputs_go_the_ordinary_way() -> None:
    layer = nn.Linear(4, 3)
    speed_up(layer)
    assert layer(torch.zeros(0, 4)).shape == (0, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.zeros(2, 4)).dtype == torch.bfloat16
