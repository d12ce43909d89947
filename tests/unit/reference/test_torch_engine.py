"""The torch engine against plain loops over transformers' own forward pass, on tiny random models."""

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from steersman.reference.engine.port import LogprobQuery
from steersman.reference.engine.torch_engine import TorchLogprobEngine
from steersman.reference.settings import ReferenceSettings
from steersman.serving.models import digest_folder
from steersman.serving.packing import round_up
from steersman.wire.identity import ModelInfo

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def tiny_qwen() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)).eval()


def engine_of(model, **options) -> TorchLogprobEngine:
    info = ModelInfo(name="tiny", vocab_size=VOCAB, max_sequence_tokens=64)
    return TorchLogprobEngine(model, info, **options)


def queries(lengths: list[int], **options) -> list[LogprobQuery]:
    rng = np.random.default_rng(1)
    return [
        LogprobQuery(
            token_ids=rng.integers(0, VOCAB, length, dtype=np.int32), prompt_length=1 + index % (length - 1), **options
        )
        for index, length in enumerate(lengths)
    ]


@torch.no_grad()
def plain_loop(model, query: LogprobQuery) -> tuple[list[float], list[float]]:
    """One row, one token at a time, from the full logits."""
    ids = torch.tensor(query.token_ids.tolist())
    logits = model(input_ids=ids[None]).logits[0].float()
    logprobs, entropies = [], []
    for position in range(query.prompt_length, len(ids)):
        distribution = torch.log_softmax(logits[position - 1] / query.temperature, dim=-1)
        logprobs.append(float(distribution[ids[position]]))
        entropies.append(float(-(distribution.exp() * distribution).sum()))
    return logprobs, entropies


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
def test_logprobs_and_entropies_of_ragged_rows(temperature):
    model = tiny_qwen()
    batch = queries([20, 3, 11, 2, 20], temperature=temperature, include_entropy=True)
    for query, row in zip(batch, engine_of(model).compute(batch), strict=True):
        logprobs, entropies = plain_loop(model, query)
        assert row.logprobs.dtype == np.float32
        np.testing.assert_allclose(row.logprobs, logprobs, atol=1e-5)
        np.testing.assert_allclose(row.entropies, entropies, atol=1e-5)


def test_a_common_beginning_is_computed_once_and_changes_nothing():
    model = tiny_qwen()
    engine = engine_of(model)
    assert engine.shares_prefixes
    rng = np.random.default_rng(3)
    prompt = rng.integers(0, VOCAB, 30, dtype=np.int32)
    whole = np.concatenate([prompt, rng.integers(0, VOCAB, 12, dtype=np.int32)])
    rows = [whole, np.concatenate([prompt, whole[:9]]), whole[:37], whole, whole[20:]]
    # Responses that begin within the common part, at its end, and after it.
    batch = [
        LogprobQuery(token_ids=row, prompt_length=length, include_entropy=True)
        for row, length in zip(rows, (1, 30, 36, 35, 4), strict=True)
    ]
    num_tokens: list[int] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: num_tokens.append(len(output)))
    outcomes = engine.compute(batch)
    assert num_tokens == [round_up(42 + 9 + 22, 64)]
    for query, row in zip(batch, outcomes, strict=True):
        logprobs, entropies = plain_loop(model, query)
        np.testing.assert_allclose(row.logprobs, logprobs, atol=1e-5)
        np.testing.assert_allclose(row.entropies, entropies, atol=1e-5)


def test_a_window_is_not_mistaken_for_plain_attention_because_probes_are_short():
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4096)).eval()
    engine = engine_of(model)
    assert not engine.shares_prefixes
    batch = queries([20, 5])
    for query, row in zip(batch, engine.compute(batch), strict=True):
        np.testing.assert_allclose(row.logprobs, plain_loop(model, query)[0], atol=1e-5)


def test_rows_of_one_batch_may_differ_in_temperature_and_entropy():
    model = tiny_qwen()
    batch = [*queries([9], temperature=2.0), *queries([12], include_entropy=True)]
    hot, plain = engine_of(model).compute(batch)
    np.testing.assert_allclose(hot.logprobs, plain_loop(model, batch[0])[0], atol=1e-5)
    np.testing.assert_allclose(plain.logprobs, plain_loop(model, batch[1])[0], atol=1e-5)
    assert hot.entropies is None
    assert plain.entropies is not None


def test_the_projection_never_sees_more_rows_than_a_chunk():
    model = tiny_qwen()
    chunked = engine_of(model, logits_chunk_bytes=4 * VOCAB * 5)
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(len(output)))
    batch = queries([20, 17, 9])
    rows = chunked.compute(batch)
    assert max(seen) == 5
    assert sum(seen) == sum(len(row.logprobs) for row in rows)
    for query, row in zip(batch, rows, strict=True):
        np.testing.assert_allclose(row.logprobs, plain_loop(model, query)[0], atol=1e-5)


def test_batches_of_all_sizes_give_the_same_log_probs_and_few_sizes_are_computed():
    model = tiny_qwen()
    engine = engine_of(model)
    batch = queries(list(np.random.default_rng(4).integers(5, 40, 24)))
    expected = [plain_loop(model, query) for query in batch]
    sizes: set[int] = set()
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: sizes.add(len(output)))
    for stop in range(1, len(batch) + 1):
        for row, (logprobs, _) in zip(engine.compute(batch[:stop]), expected, strict=False):
            np.testing.assert_allclose(row.logprobs, logprobs, atol=1e-5)
    assert all(size == round_up(size, 64) for size in sizes)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(**SIZES)),
        (GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=4.0)),
        (Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0, pad_token_id=0)),
        (GPT2LMHeadModel, GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4)),
    ],
    ids=["llama", "granite-scaled", "gemma2-capped", "gpt2"],
)
def test_architectures_that_treat_logits_differently(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    batch = queries([16, 5, 30])
    for query, row in zip(batch, engine_of(model).compute(batch), strict=True):
        np.testing.assert_allclose(row.logprobs, plain_loop(model, query)[0], atol=1e-5)


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused():
    class Odd(Qwen2ForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 3
            return output

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="model: Odd cannot be served"):
        engine_of(Odd(Qwen2Config(**SIZES)).eval())


def test_broken_weights_give_nan_rather_than_a_number():
    model = tiny_qwen()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    (row,) = engine_of(model).compute(queries([5], include_entropy=True))
    assert np.isnan(row.logprobs).all()
    assert row.entropies is not None
    assert np.isnan(row.entropies).all()


def test_a_masked_token_does_not_spoil_the_entropy():
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB))
    with torch.no_grad():
        model.lm_head.bias[3] = -torch.inf
    query = LogprobQuery(token_ids=np.array([1, 2, 5, 4], np.int32), prompt_length=1, include_entropy=True)
    (row,) = engine_of(model).compute([query])
    assert row.entropies is not None
    assert np.isfinite(row.entropies).all()


def test_load_reads_a_folder_and_digests_its_weights(tmp_path):
    model = tiny_qwen()
    model.generation_config.eos_token_id = [7, 8]
    model.save_pretrained(tmp_path / "tiny")
    settings = ReferenceSettings(model=str(tmp_path / "tiny"), num_threads=1, max_sequence_tokens=48)
    engine = TorchLogprobEngine.load(settings)
    assert engine.model.name == "tiny"
    assert engine.model.revision == digest_folder(tmp_path / "tiny")
    assert engine.model.vocab_size == VOCAB
    assert engine.model.max_sequence_tokens == 48
    assert engine.model.dtype == "float32"
    assert engine.model.eos_token_ids == (7, 8)
    (query,) = queries([12])
    np.testing.assert_allclose(engine.compute([query])[0].logprobs, plain_loop(model, query)[0], atol=1e-5)


def test_the_revision_changes_with_the_weights(tmp_path):
    model = tiny_qwen()
    model.save_pretrained(tmp_path)
    before = digest_folder(tmp_path)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    model.save_pretrained(tmp_path)
    assert digest_folder(tmp_path) != before


def test_bfloat16_stays_near_float32(tmp_path):
    model = tiny_qwen()
    model.save_pretrained(tmp_path)
    engine = TorchLogprobEngine.load(ReferenceSettings(model=str(tmp_path), num_threads=1, dtype="bfloat16"))
    assert engine.model.dtype == "bfloat16"
    (query,) = queries([30])
    difference = np.abs(engine.compute([query])[0].logprobs - plain_loop(model, query)[0])
    assert 0 < difference.mean() < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/no/such/folder"}, "model: is '/no/such/folder', which does not exist"),
        ({"device": "cuda:7"}, "device: is 'cuda:7', allowed: auto or a device that is there"),
        ({"device": "abacus"}, "device: is 'abacus', allowed"),
    ],
)
def test_a_wrong_setting_is_named(changes, message):
    settings = ReferenceSettings(**({"model": "/no/such/folder", "num_threads": 1} | changes))
    with pytest.raises(ValueError, match=message):
        TorchLogprobEngine.load(settings)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"which holds no config\.json"):
        TorchLogprobEngine.load(ReferenceSettings(model=str(tmp_path), num_threads=1))
