"""Packed rows: the states and gradients of padded ones, for every kind of model that packs."""

import copy
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from steersman.serving.packed_decoder import KINDS
from steersman.trainer.algorithm import decoder_blocks, packed_attention
from steersman.trainer.algorithm.packed_attention import Heads, Pack, attend
from steersman.trainer.stages.linear import speed_up
from steersman.trainer.stages.packed import batch_of, let_pack, packing_step, states_at

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
ROWS = [list(range(1, 12)), [5, 6, 7], [9], list(range(20, 38)), [3, 3, 3, 3]]


def build(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SHAPE | changes))).eval()
    for parameter in model.parameters():  # norms of one and biases of zero would hide mistakes
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def states_and_gradients(model: Any, rows: list[list[int]], step: int | None) -> tuple[Tensor, list[Tensor]]:
    """At all but the first token of each row, and at the only token of a short one."""
    batch = batch_of(rows, CPU, step=step)
    positions = [
        start + place
        for start, row in zip(batch.starts_B, rows, strict=True)
        for place in range(min(1, len(row) - 1), len(row))
    ]
    model.zero_grad()
    states_PD = states_at(model, batch, batch.rounded(torch.tensor(positions)))[: len(positions)]
    weights = torch.randn(states_PD.shape, generator=torch.Generator().manual_seed(1))
    (states_PD * weights).sum().backward()
    return states_PD.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def assert_alike(ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]], tolerance: float) -> None:
    for one, other in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True):
        assert float((one - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("step", [1, 16])
@pytest.mark.parametrize("fast", [False, True])
def test_every_kind_gives_what_padded_rows_give(kind: str, step: int, fast: bool) -> None:
    changes = {"sliding_window": None} if kind == "mistral" else {}
    model = build(kind, **changes)
    expected = states_and_gradients(copy.deepcopy(model), ROWS, None)
    assert let_pack(model)
    if fast:
        speed_up(model)
    assert_alike(states_and_gradients(model, ROWS, step), expected, 5e-5)
    # Padded rows still go the model's own way.
    assert_alike(states_and_gradients(model, ROWS, None), expected, 5e-5)


def test_biases_of_all_layers_and_long_rows_are_computed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", attention_bias=True, mlp_bias=True)
    expected = states_and_gradients(copy.deepcopy(model), ROWS, None)
    let_pack(model)
    speed_up(model)
    assert_alike(states_and_gradients(model, ROWS, 1), expected, 5e-5)
    # Rows too long for plain products, and more tokens than go through a step at a time.
    monkeypatch.setattr(packed_attention, "_LONGEST_FOR_PRODUCTS", 2)
    monkeypatch.setattr(decoder_blocks, "_CHUNK_TOKENS", 5)
    assert_alike(states_and_gradients(model, ROWS, 1), expected, 5e-5)


def test_under_autocast_packed_rows_give_what_padded_ones_give() -> None:
    model = build("qwen2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = states_and_gradients(copy.deepcopy(model), ROWS, None)
        let_pack(model)
        speed_up(model)
        ours = states_and_gradients(model, ROWS, 16)
    torch.testing.assert_close(ours[0], expected[0], atol=0.1, rtol=0.1)


PACKED = build("qwen2")
PADDED = copy.deepcopy(PACKED)
let_pack(PACKED)
speed_up(PACKED)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 39), min_size=1, max_size=40), min_size=1, max_size=8), st.sampled_from([1, 8]))
def test_any_rows_give_what_they_give_padded(rows: list[list[int]], step: int) -> None:
    assert_alike(states_and_gradients(PACKED, rows, step), states_and_gradients(PADDED, rows, None), 5e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=10), st.integers(0, 40))
def test_attention_stays_within_rows_whatever_the_blocks(lengths: list[int], max_padding: int) -> None:
    heads = Heads(num_queries=4, num_keys=2)
    pack = Pack.of(lengths, CPU, max_padding=max_padding)
    assert pack.positions_T.tolist() == [place for length in lengths for place in range(length)]
    for block in pack.blocks:
        assert int((~block.real_bL).sum()) <= max_padding
    generator = torch.Generator().manual_seed(len(lengths))
    qkv_THR = torch.randn(sum(lengths), heads.total, 8, generator=generator, requires_grad=True)
    weights = torch.randn(sum(lengths), 32, generator=generator)
    ours = attend(qkv_THR, pack, heads, 0.3)
    plain = torch.cat(
        [row_by_row(qkv_THR[end - length : end]) for end, length in zip(accumulate(lengths), lengths, strict=True)]
    )
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)
    gradients = [torch.autograd.grad((output * weights).sum(), qkv_THR)[0] for output in (ours, plain)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def row_by_row(qkv_LHR: Tensor) -> Tensor:
    query, key, value = (part.transpose(0, 1) for part in qkv_LHR.split([4, 2, 2], 1))
    key, value = key.repeat_interleave(2, 0), value.repeat_interleave(2, 0)
    scores = (query @ key.mT * 0.3).masked_fill(torch.ones(len(qkv_LHR), len(qkv_LHR)).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)


def test_numbers_of_tokens_are_few_on_a_small_model() -> None:
    model = build("qwen2")
    assert packing_step(model) is None
    let_pack(model)
    step = packing_step(model)
    assert step is not None
    assert step > 1000  # so small a model may be filled up by any number
    sizes = {batch_of([[1] * number], CPU, step=64).ids_BT.shape[1] for number in range(512, 1024)}
    assert sizes == set(range(576, 1025, 64))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {}),
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
        ("llama", {"hidden_act": "gelu"}),
    ],
)
def test_other_models_stay_on_padded_rows(kind: str, changes: dict[str, Any]) -> None:
    shape = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2} if kind == "gpt2" else SHAPE | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    assert not let_pack(model)
    assert packing_step(model) is None


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        Pack.of([], CPU, max_padding=0)
    with pytest.raises(ValueError, match="at least 1 token"):
        Pack.of([3, 0], CPU, max_padding=0)
