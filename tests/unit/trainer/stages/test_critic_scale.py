"""The critic starts on the scale of the scores that the reward service gives for its checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from steersman.reward.engine.normalization import stored_normalization
from steersman.reward.engine.torch_engine import read_normalization
from steersman.trainer.checkpoint import models
from steersman.trainer.checkpoint.atomic import CheckpointError
from steersman.trainer.checkpoint.models import (
    load_scalar_head,
    load_tokenizer,
    load_weights,
    save_model,
    score_head,
    write_model,
)
from steersman.trainer.stages.padded import hidden_states
from steersman.trainer.stages.ppo_config import PpoConfig
from steersman.trainer.stages.ppo_loop import load_models
from steersman.trainer.stages.reward_normalization import FILE_NAME

IDS = torch.tensor([[3, 4, 5, 1], [6, 7, 8, 1]])
SCALE = {"version": 1, "mean": 4.5, "std": 2.5}


@pytest.fixture
def reward(tiny_model, tiny_tokenizer, tmp_path) -> PreTrainedModel:
    """A reward model, in the folder `reward`."""
    tokenizer = load_tokenizer(tiny_tokenizer)
    model = load_scalar_head(tiny_model, seed=1, tokenizer=tokenizer)
    torch.nn.init.normal_(score_head(model).weight)
    save_model(tmp_path / "reward", model, tokenizer, files={FILE_NAME: SCALE})
    return model


@pytest.fixture
def critic_of(tiny_model, tiny_tokenizer, tmp_path):
    def load(*, in_parts: bool = False, **changes) -> models.Opened:
        settings = {
            "actor": tiny_model.model_dump(),
            "critic": {"path": str(tmp_path / "reward")},
            "tokenizer": tiny_tokenizer,
            "prompts": {"files": ["unused"]},
        }
        config = PpoConfig.model_validate(settings | changes)
        return load_models(config, load_tokenizer(tiny_tokenizer), in_parts=in_parts)[1]

    return load


@torch.no_grad()
def values(model: PreTrainedModel) -> torch.Tensor:
    return score_head(model)(hidden_states(model, IDS)).squeeze(-1)


def test_its_values_are_the_served_scores(reward, critic_of, tmp_path):
    served = stored_normalization("models", tmp_path / "reward")
    expected = served.apply(values(reward))
    torch.testing.assert_close(values(critic_of().model), expected)
    torch.testing.assert_close(values(critic_of(critic_scale="raw").model), values(reward))
    assert score_head(critic_of(critic_scale="raw").model).bias is None


def test_read_in_parts_it_is_the_same(reward, critic_of, tmp_path):
    whole, opened = critic_of().model, critic_of(in_parts=True)
    assert opened.files is not None
    head = score_head(opened.model)
    assert torch.equal(head.weight, score_head(whole).weight)
    assert torch.equal(head.bias, score_head(whole).bias)
    assert "score.weight" not in opened.files
    assert "model.norm.weight" in opened.files


def test_the_configuration_says_so_where_no_file_does(reward, critic_of, tmp_path):
    (tmp_path / "reward" / FILE_NAME).unlink()
    torch.testing.assert_close(values(critic_of().model), values(reward))
    path = tmp_path / "reward" / "config.json"
    config = json.loads(path.read_text()) | {"reward_mean": -1.5, "reward_std": 0.5}
    path.write_text(json.dumps(config))
    critic = critic_of().model
    torch.testing.assert_close(values(critic), read_normalization("models", critic.config).apply(values(reward)))


def test_the_critic_of_an_actor_starts_at_zero_whatever_lies_beside_it(tiny_model, reward, critic_of):
    critic = critic_of(critic=None).model
    assert not values(critic).any()
    assert score_head(critic).bias is None


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"version": 2}', '{"version": 1, "mean": 0}', '{"version": 1, "mean": 0, "std": 0}']
)
def test_a_scale_of_no_use_is_refused(reward, critic_of, tmp_path, content):
    (tmp_path / "reward" / FILE_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=FILE_NAME):
        critic_of()


@pytest.mark.parametrize("converted", [False, True])
def test_what_it_learned_comes_back_from_a_checkpoint(reward, critic_of, tmp_path: Path, monkeypatch, converted):
    critic, again = critic_of().model, critic_of().model
    with torch.no_grad():
        score_head(critic).bias += 3
    write_model(tmp_path, critic)
    if converted:  # as if transformers alone could read the files, of a class that has no such bias
        monkeypatch.setattr(models.WeightFiles, "of", lambda *_: None)
    load_weights(again, tmp_path)
    assert torch.equal(values(again), values(critic))
