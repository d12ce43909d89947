import pytest
import torch
from pydantic import ValidationError

from steersman.trainer.checkpoint.atomic import CheckpointError, verify
from steersman.trainer.checkpoint.models import (
    load_actor,
    load_scalar_head,
    load_tokenizer,
    load_weights,
    require_savable,
    resolve_device,
    save_model,
    score_head,
)
from steersman.trainer.checkpoint.source import ModelSource

IDS = torch.tensor([[3, 4, 5, 1, 0, 0], [6, 7, 8, 9, 10, 1]])


def test_the_seed_alone_decides_a_model_from_scratch(tiny, tokenizer):
    before = torch.get_rng_state()
    one, same, other = (load_actor(tiny, seed=seed, tokenizer=tokenizer) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [m.model.embed_tokens.weight for m in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert one.config.vocab_size == len(tokenizer)
    assert one.config.eos_token_id == tokenizer.eos_token_id
    assert not one.training


def test_saved_model_and_tokenizer_come_back(tiny, tokenizer, tmp_path):
    actor = load_actor(tiny, tokenizer=tokenizer)
    save_model(tmp_path / "model", actor, tokenizer, metadata={"step": 1})
    verify(tmp_path / "model")
    again = load_actor(ModelSource(path=str(tmp_path / "model")))
    torch.testing.assert_close(again(IDS).logits, actor(IDS).logits, rtol=0, atol=0)
    assert load_tokenizer(str(tmp_path / "model"))("w1 w2").input_ids == tokenizer("w1 w2").input_ids


def test_a_tokenizer_that_services_would_misread_is_refused(tiny, tokenizer, tmp_path):
    settings = {name: value for name, value in tiny.config.items() if name != "head_dim"}
    actor = load_actor(ModelSource(config={**settings, "model_type": "qwen2"}), tokenizer=tokenizer)
    with pytest.raises(CheckpointError, match="AutoTokenizer reads a Qwen2Tokenizer for model_type 'qwen2'"):
        save_model(tmp_path / "model", actor, tokenizer)
    assert not (tmp_path / "model").exists()
    # The same answer is there before anything is trained.
    with pytest.raises(CheckpointError, match="AutoTokenizer reads a Qwen2Tokenizer for model_type 'qwen2'"):
        require_savable(actor, tokenizer)
    require_savable(load_actor(tiny, tokenizer=tokenizer), tokenizer)


def test_a_scalar_head_starts_from_an_actor_and_a_critic_from_a_scalar_head(tiny, tokenizer, tmp_path):
    actor = load_actor(tiny, seed=5, tokenizer=tokenizer)
    save_model(tmp_path / "actor", actor, tokenizer)
    reward = load_scalar_head(ModelSource(path=str(tmp_path / "actor")), tokenizer=tokenizer)
    assert torch.equal(reward.model.embed_tokens.weight, actor.model.embed_tokens.weight)
    assert (score_head(reward).weight == 0).all()
    torch.nn.init.normal_(score_head(reward).weight)
    save_model(tmp_path / "reward", reward, tokenizer)
    critic = load_scalar_head(ModelSource(path=str(tmp_path / "reward")), tokenizer=tokenizer)
    assert all(map(torch.equal, critic.parameters(), reward.parameters()))


def test_load_weights_in_place(tiny, tokenizer, tmp_path):
    one, other = (load_actor(tiny, seed=seed, tokenizer=tokenizer) for seed in (1, 2))
    save_model(tmp_path / "one", one)
    parameter = other.model.embed_tokens.weight
    load_weights(other, tmp_path / "one")
    assert other.model.embed_tokens.weight is parameter
    assert torch.equal(parameter, one.model.embed_tokens.weight)


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "a/b/c"])
def test_a_missing_checkpoint_is_named(path):
    for load in (load_actor, load_scalar_head):
        with pytest.raises(CheckpointError, match=f"checkpoint: is '{path}', which does not exist"):
            load(ModelSource(path=path))
    with pytest.raises(CheckpointError, match=f"tokenizer: is '{path}', which does not exist"):
        load_tokenizer(path)


def test_an_empty_directory_is_no_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        load_actor(ModelSource(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen2", "hiden_size": 8}, r"config.hiden_size is not a setting of model_type 'qwen2'"),
        ({"model_type": "nonesuch"}, "not valid for model_type 'nonesuch'"),
        ({"model_type": "qwen2", "vocab_size": 4}, "config.vocab_size is 4, must be at least the tokenizer's 32"),
    ],
)
def test_a_bad_configuration_is_named(config, message, tokenizer):
    with pytest.raises(CheckpointError, match=message):
        load_actor(ModelSource(config=config), tokenizer=tokenizer)


def test_a_tokenizer_must_not_have_more_tokens_than_the_model(tiny, tokenizer, tmp_path):
    save_model(tmp_path / "small", load_actor(ModelSource(config={**tiny.config, "vocab_size": 16})))
    with pytest.raises(CheckpointError, match="the tokenizer has 32 tokens, must be at most the model's 16"):
        load_actor(ModelSource(path=str(tmp_path / "small")), tokenizer=tokenizer)


def test_a_source_is_a_path_or_a_configuration():
    for bad in ({}, {"path": "x", "config": {"model_type": "qwen2"}}, {"config": {}}, {"path": "x", "pth": 1}):
        with pytest.raises(ValidationError):
            ModelSource.model_validate(bad)


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="device is 'gpu7'"):
        resolve_device("gpu7")
