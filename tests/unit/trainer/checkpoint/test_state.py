import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.trainer.checkpoint.atomic import CheckpointError
from steersman.trainer.checkpoint.state import load_state, random_state, restore_random_state, save_state

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers() | st.just("$"), inner, max_size=3)
    ),
    max_leaves=12,
)


def same(a, b) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=3), trees, max_size=3))
def test_any_tree_comes_back_equal(tmp_path_factory, tree):
    directory = tmp_path_factory.mktemp("state")
    save_state(directory, tree)
    assert same(load_state(directory), tree)


def test_tensors_come_back_bit_for_bit_even_when_they_share_memory(tmp_path):
    base = torch.randn(4, 4)
    state = {"a": base, "b": base[1], "t": base.T, "half": base.bfloat16(), "scalar": torch.tensor(3), "l": [base]}
    save_state(tmp_path, state)
    loaded = load_state(tmp_path)
    for name in ("a", "b", "t", "half", "scalar"):
        assert loaded[name].dtype == state[name].dtype
        assert torch.equal(loaded[name], state[name])
    assert torch.equal(loaded["l"][0], base)


def test_an_optimizer_goes_on_exactly(tmp_path):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model, optimizer, x):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    data = torch.randn(4, 5, 3)
    straight, optimizer = make()
    for x in data:
        step(straight, optimizer, x)

    first, optimizer = make()
    for x in data[:2]:
        step(first, optimizer, x)
    save_state(tmp_path, {"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    second, optimizer = make()
    loaded = load_state(tmp_path)
    second.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    for x in data[2:]:
        step(second, optimizer, x)
    assert torch.equal(second.weight, straight.weight)


def test_random_generators_go_on_exactly(tmp_path):
    save_state(tmp_path, {"random": random_state()})
    expected = (random.random(), torch.rand(3))
    restore_random_state(load_state(tmp_path)["random"])
    got = (random.random(), torch.rand(3))
    assert got[0] == expected[0]
    assert torch.equal(got[1], expected[1])


def test_what_cannot_be_kept_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"state\.a\.0 is a set"):
        save_state(tmp_path, {"a": [{1}]})


def test_a_broken_file_is_a_checkpoint_error(tmp_path):
    save_state(tmp_path, {"a": torch.zeros(3)})
    (tmp_path / "state.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(tmp_path)
