import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from steersman.trainer.checkpoint import models
from steersman.trainer.checkpoint.models import (
    load_actor,
    load_scalar_head,
    open_actor,
    open_scalar_head,
    read_weights,
)
from steersman.trainer.checkpoint.parts import WeightFiles, open_model
from steersman.trainer.checkpoint.source import ModelSource

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
# Scales its embeddings by a buffer, and has two kinds of rotary embeddings.
GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 2,
}


def write(folder, config, tokenizer, *, load=load_actor, dtype=torch.float32, **settings):
    model = load(ModelSource(config=config), seed=1, tokenizer=tokenizer)
    model.to(dtype).save_pretrained(folder, **settings)
    return ModelSource(path=str(folder))


def require_same(opened, loaded):
    """What was opened holds no value that its files have, and is the same model once they are read."""
    model, files = opened.model, opened.files
    assert files is not None
    for name, parameter in model.named_parameters():
        assert parameter.is_meta == (name in files), name
    names = [name for name in model.state_dict() if name in files]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    values = {name: files.rows(name, 0, shapes[name][0]).to(torch.float32) for name in names}
    model.load_state_dict(values, strict=False, assign=True)
    expected = loaded.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(loaded.named_buffers()).keys()
    assert all(torch.equal(buffers[name], buffer) for name, buffer in loaded.named_buffers())
    assert model.config.to_dict() == loaded.config.to_dict()
    assert model.training == loaded.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", ["qwen3", "gpt2", "gemma3"])
def test_what_is_read_in_parts_is_what_from_pretrained_gives(tiny, tokenizer, tmp_path, config, tied, dtype):
    config = {"qwen3": tiny.config, "gpt2": GPT2, "gemma3": GEMMA3}[config] | {"tie_word_embeddings": tied}
    source = write(tmp_path, config, tokenizer, dtype=dtype, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    require_same(open_actor(source, seed=3, in_parts=True), load_actor(source, seed=3))
    require_same(open_scalar_head(source, seed=3, in_parts=True), load_scalar_head(source, seed=3))


def test_a_head_that_the_files_lack_is_drawn_from_the_seed_as_ever(tiny, tokenizer, tmp_path):
    source = write(tmp_path, tiny.config | {"tie_word_embeddings": False}, tokenizer, load=load_scalar_head)
    opened = open_actor(source, seed=3, in_parts=True)
    assert not opened.model.lm_head.weight.is_meta
    assert opened.model.lm_head.weight.abs().sum() > 0
    require_same(opened, load_actor(source, seed=3))
    require_same(open_scalar_head(source, in_parts=True), load_scalar_head(source))


def test_files_of_a_backbone_alone_are_read(tiny, tokenizer, tmp_path):
    source = write(tmp_path, tiny.config, tokenizer)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    require_same(open_actor(source, in_parts=True), load_actor(source))


def test_tied_tensors_may_be_stored_twice_or_under_either_name(tiny, tokenizer, tmp_path):
    source = write(tmp_path, tiny.config, tokenizer)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors.pop("model.embed_tokens.weight")
    for both in (True, False):
        stored = tensors | {"lm_head.weight": embedding} | ({"model.embed_tokens.weight": embedding} if both else {})
        stored = {name: tensor.clone() for name, tensor in stored.items()}
        save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
        require_same(open_actor(source, in_parts=True), load_actor(source))
    # Those that differ are not tied; that is for `from_pretrained` to decide.
    stored = tensors | {"lm_head.weight": embedding + 1, "model.embed_tokens.weight": embedding}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert open_model(AutoModelForCausalLM, tmp_path) is None
    assert open_actor(source, in_parts=True).files is None


def test_generation_settings_come_along(tiny, tokenizer, tmp_path):
    source = write(tmp_path, tiny.config, tokenizer)
    GenerationConfig(top_k=7, do_sample=True).save_pretrained(tmp_path)
    opened, loaded = open_actor(source, in_parts=True).model, load_actor(source)
    assert opened.generation_config.top_k == 7
    assert opened.generation_config.to_dict() == loaded.generation_config.to_dict()


def test_what_from_pretrained_would_convert_or_refuse_is_left_to_it(tiny, tokenizer, tmp_path):
    # Experts are stored one by one and merged.
    source = write(tmp_path / "merged", MIXTRAL, tokenizer)
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    assert stored != load_actor(source).state_dict().keys()
    assert open_model(AutoModelForCausalLM, tmp_path / "merged") is None
    opened = open_actor(source, in_parts=True)
    assert opened.files is None
    assert not any(parameter.is_meta for parameter in opened.model.parameters())

    write(tmp_path / "small", tiny.config, tokenizer)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"vocab_size": 99}))
    assert open_model(AutoModelForCausalLM, tmp_path / "small") is None
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert open_model(AutoModelForCausalLM, tmp_path / "small") is None
    (tmp_path / "small" / "model.safetensors").unlink()
    assert open_model(AutoModelForCausalLM, tmp_path / "small") is None
    assert open_actor(tiny, in_parts=True, tokenizer=tokenizer).files is None


def test_rows_are_cut_from_the_files_and_zero_beyond(tiny, tokenizer, tmp_path):
    write(tmp_path, tiny.config, tokenizer)
    model = load_actor(ModelSource(path=str(tmp_path)))
    files = WeightFiles.of(model, tmp_path)
    weight, name = model.model.embed_tokens.weight, "model.embed_tokens.weight"
    num_rows = len(weight)
    assert torch.equal(files.rows(name, 3, 5), weight[3:5])
    assert files.rows(name, num_rows, num_rows).shape == (0, 16)
    beyond = files.rows(name, num_rows - 1, num_rows + 2)
    assert torch.equal(beyond[0], weight[-1])
    assert beyond.shape == (3, 16)
    assert not beyond[1:].any()
    assert not files.rows(name, num_rows + 1, num_rows + 2).any()
    assert "model.nothing" not in files


def test_the_weights_of_a_checkpoint_are_read_without_a_second_model(tiny, tokenizer, tmp_path, monkeypatch):
    write(tmp_path, tiny.config, tokenizer)
    model = load_actor(ModelSource(path=str(tmp_path)))
    monkeypatch.setattr(models, "_from_pretrained", None)
    weights = read_weights(model, tmp_path)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
