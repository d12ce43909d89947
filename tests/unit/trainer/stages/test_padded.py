"""Hidden states of padded rows against the model's own forward pass."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from steersman.trainer.checkpoint.models import (
    lm_head,
    load_actor,
    load_scalar_head,
    load_tokenizer,
    save_model,
    score_head,
)
from steersman.trainer.checkpoint.source import ModelSource
from steersman.trainer.stages.padded import hidden_states, hidden_states_at

IDS = torch.tensor([[3, 4, 5, 1, 0, 0], [6, 7, 8, 9, 10, 1]])
LENGTHS = torch.tensor([4, 6])


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])  # with a feed-forward block that can be found, and without
def test_states_at_some_positions_are_those_of_all_and_have_their_gradients(tiny_model, tokenizer, model_type):
    config = (
        tiny_model.config if model_type == "llama" else {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2}
    )
    actor = load_actor(ModelSource(config=config), tokenizer=tokenizer)
    positions = torch.tensor([2, 3, 7, 8, 9])
    weights = torch.randn(len(positions), actor.config.hidden_size)

    def gradients(states):
        actor.zero_grad()
        (states * weights).sum().backward()
        return [parameter.grad.clone() for parameter in actor.base_model.parameters()]

    blocks = [layer.mlp for layer in getattr(actor.base_model, "layers", ())]
    num_computed: list[list[int]] = [[] for _ in blocks]
    for block, counts in zip(blocks, num_computed, strict=True):
        block.up_proj.register_forward_hook(
            lambda _, args, __, counts=counts: counts.append(args[0].shape[:-1].numel())
        )
    whole = hidden_states(actor, IDS).flatten(0, 1)[positions]
    some = hidden_states_at(actor, IDS, positions)
    assert num_computed == [[12, 12], [12, 5]][: len(blocks)]
    torch.testing.assert_close(some, whole)
    torch.testing.assert_close(gradients(some), gradients(whole))
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


def test_hidden_states_times_head_are_the_logits_and_padding_does_not_matter(tiny_model, tokenizer):
    actor = load_actor(tiny_model, tokenizer=tokenizer)
    with torch.no_grad():
        got = hidden_states(actor, IDS) @ lm_head(actor).weight.T
        for row, length in zip(range(2), LENGTHS.tolist(), strict=True):
            alone = actor(IDS[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(got[row, :length], alone, rtol=1e-5, atol=1e-5)


def test_scores_equal_the_hugging_face_forward_pass(tiny_model, tokenizer, tmp_path):
    reward = load_scalar_head(tiny_model, tokenizer=tokenizer)
    torch.nn.init.normal_(score_head(reward).weight)
    save_model(tmp_path / "reward", reward, tokenizer)
    served = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    with torch.no_grad():
        expected = served(input_ids=IDS, attention_mask=(IDS != 0).long()).logits.squeeze(-1)
        last_BD = hidden_states(reward, IDS)[torch.arange(2), LENGTHS - 1]
        torch.testing.assert_close(score_head(reward)(last_BD).squeeze(-1), expected, rtol=1e-5, atol=1e-5)
