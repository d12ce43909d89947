"""The scalar-head engine against transformers' own forward pass, one row at a time, on tiny random models."""

import math

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    JambaConfig,
    JambaForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from steersman.reward.engine.port import Normalization
from steersman.reward.engine.torch_engine import TorchScoreEngine, read_normalization
from steersman.reward.settings import ModelScorerSettings
from steersman.serving import packed_decoder
from steersman.serving.packing import round_up
from steersman.wire.identity import ModelInfo

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "num_labels": 1,
}
INFO = ModelInfo(name="tiny", vocab_size=VOCAB, max_sequence_tokens=64)


def tiny_qwen(**changes) -> Qwen2ForSequenceClassification:
    torch.manual_seed(0)
    config = Qwen2Config(**(SIZES | {"num_key_value_heads": 2, "pad_token_id": 0} | changes))
    return Qwen2ForSequenceClassification(config).eval()


def ragged(lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(1, VOCAB, length, dtype=np.int32) for length in lengths]


@torch.no_grad()
def plain_loop(model, rows: list[np.ndarray]) -> list[float]:
    return [float(model(input_ids=torch.tensor([row.tolist()])).logits[0, 0]) for row in rows]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (Qwen2ForSequenceClassification, Qwen2Config(**SIZES, num_key_value_heads=2, pad_token_id=0)),
        (Qwen2ForSequenceClassification, Qwen2Config(**SIZES, num_key_value_heads=2)),
        (LlamaForSequenceClassification, LlamaConfig(**SIZES, pad_token_id=0)),
        (
            GPT2ForSequenceClassification,
            GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, num_labels=1, pad_token_id=0),
        ),
        (BertForSequenceClassification, BertConfig(**SIZES, pad_token_id=0)),
    ],
    ids=["qwen2", "qwen2-without-padding-id", "llama", "gpt2", "bert-an-encoder"],
)
def test_scores_of_ragged_rows(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    rows = ragged([20, 3, 11, 1, 20, 64])
    scores = TorchScoreEngine(model, INFO).score(rows)
    np.testing.assert_allclose(scores, plain_loop(model, rows), atol=1e-5)
    assert len(set(scores)) == len(scores)


def family(seed: int = 5) -> list[np.ndarray]:
    """A conversation of two turns with several answers at each, one of them twice, and a stranger."""
    rng = np.random.default_rng(seed)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(3, VOCAB, count, dtype=np.int32)

    prompt, turn = tokens(20), tokens(18)
    answers = [np.concatenate([prompt, tokens(length)]) for length in (1, 9, 30)]
    later = [np.concatenate([prompt, turn, tokens(length)]) for length in (5, 14)]
    return [
        answers[0],
        later[0],
        tokens(33),
        answers[1],
        answers[1],
        np.concatenate([prompt, turn]),
        later[1],
        answers[2],
    ]


OWN_FORWARD_PASS = [
    (Qwen2ForSequenceClassification, Qwen2Config(**SIZES, num_key_value_heads=2, pad_token_id=0)),
    (LlamaForSequenceClassification, LlamaConfig(**SIZES, pad_token_id=0)),
    (MistralForSequenceClassification, MistralConfig(**SIZES, num_key_value_heads=1, sliding_window=None)),
    (Qwen3ForSequenceClassification, Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16, pad_token_id=0)),
]
PLAIN_CAUSAL = [
    *OWN_FORWARD_PASS,
    (
        GPT2ForSequenceClassification,
        GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, num_labels=1, pad_token_id=0),
    ),
]


@pytest.mark.parametrize(("kind", "config"), PLAIN_CAUSAL, ids=["qwen2", "llama", "mistral", "qwen3", "gpt2"])
def test_shared_beginnings_are_computed_once_and_change_nothing(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    rows = family()
    engine = TorchScoreEngine(model, INFO)
    assert engine.shares_prefixes
    computed: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda module, args: computed.append(args[0].numel()))
    scores = engine.score(rows)
    hook.remove()
    num_tokens = 20 + 18 + 1 + 9 + 30 + 5 + 14 + 33
    assert computed == [num_tokens if kind is GPT2ForSequenceClassification else round_up(num_tokens, 64)]
    np.testing.assert_allclose(scores, plain_loop(model, rows), atol=1e-5)
    np.testing.assert_allclose(scores, engine.score(rows[::-1])[::-1], atol=1e-5)
    apart = TorchScoreEngine(model, INFO, share_prefixes=False)
    assert not apart.shares_prefixes
    np.testing.assert_allclose(scores, apart.score(rows), atol=1e-5)


@pytest.mark.parametrize(("kind", "config"), OWN_FORWARD_PASS, ids=["qwen2", "llama", "mistral", "qwen3"])
def test_the_last_layer_computes_last_tokens_alone(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    rows = family()
    engine = TorchScoreEngine(model, INFO)
    counts: list[list[int]] = [[] for _ in model.model.layers]
    for layer, seen in zip(model.model.layers, counts, strict=True):
        layer.mlp.down_proj.register_forward_hook(lambda _, __, output, seen=seen: seen.append(len(output)))
    engine.score(rows)
    assert counts == [[round_up(20 + 18 + 1 + 9 + 30 + 5 + 14 + 33, 64)], [len(rows)]]


def test_packs_of_all_sizes_give_the_same_scores_and_few_sizes_are_computed():
    model = tiny_qwen(max_position_embeddings=1024)
    rng = np.random.default_rng(2)
    rows = [rng.integers(1, VOCAB, length, dtype=np.int32) for length in rng.integers(9, 40, 40)]
    engine = TorchScoreEngine(model, ModelInfo(name="tiny", vocab_size=VOCAB, max_sequence_tokens=1024))
    expected = plain_loop(model, rows)
    sizes: set[int] = set()
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: sizes.add(args[0].numel()))
    for stop in range(1, len(rows) + 1):
        np.testing.assert_allclose(engine.score(rows[:stop]), expected[:stop], atol=1e-5)
    assert len(sizes) < 0.8 * len(rows)


def test_a_large_model_computes_no_tokens_beyond_those_it_is_given(monkeypatch):
    monkeypatch.setattr(packed_decoder, "_MAX_PADDING", 1)  # as if it had as many parameters as that allows
    model = tiny_qwen()
    engine = TorchScoreEngine(model, INFO)
    computed: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: computed.append(args[0].numel()))
    engine.score([np.arange(33, dtype=np.int32)])
    assert computed == [33]


def test_an_architecture_that_does_more_than_is_known_goes_through_its_own_modules():
    model = tiny_qwen()
    plain = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda states: 2 * plain(states)
    rows = family()
    engine = TorchScoreEngine(model, INFO)
    assert engine.shares_prefixes
    np.testing.assert_allclose(engine.score(rows), plain_loop(model, rows), atol=1e-5)


def test_answers_longer_than_a_chunk_of_queries():
    model = tiny_qwen(max_position_embeddings=1024)
    rng = np.random.default_rng(1)
    prompt = rng.integers(1, VOCAB, 300, dtype=np.int32)
    rows = [np.concatenate([prompt, rng.integers(1, VOCAB, length, dtype=np.int32)]) for length in (600, 256, 257, 3)]
    engine = TorchScoreEngine(model, ModelInfo(name="tiny", vocab_size=VOCAB, max_sequence_tokens=1024))
    assert engine.shares_prefixes
    np.testing.assert_allclose(engine.score(rows), plain_loop(model, rows), atol=1e-5)


def test_shared_beginnings_in_bfloat16():
    model = tiny_qwen().bfloat16()
    rows = family()
    engine = TorchScoreEngine(model, INFO)
    assert engine.shares_prefixes
    apart = TorchScoreEngine(model, INFO, share_prefixes=False)
    np.testing.assert_allclose(engine.score(rows), apart.score(rows), atol=0.2)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (
            Qwen2ForSequenceClassification,
            Qwen2Config(
                **SIZES, num_key_value_heads=2, pad_token_id=0, use_sliding_window=True, sliding_window=50,
                max_window_layers=1,
            ),
        ),
        (
            MistralForSequenceClassification,
            MistralConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, sliding_window=50),
        ),
        (
            Gemma2ForSequenceClassification,
            Gemma2Config(
                **SIZES, num_key_value_heads=2, pad_token_id=0, head_dim=8, layer_types=["full_attention"] * 2
            ),
        ),
        (BertForSequenceClassification, BertConfig(**SIZES, pad_token_id=0)),
        (
            JambaForSequenceClassification,
            JambaConfig(
                **SIZES, num_key_value_heads=2, pad_token_id=0, use_mamba_kernels=False, attn_layer_period=2,
                attn_layer_offset=1, num_experts=1, num_experts_per_tok=1, mamba_d_state=4, mamba_dt_rank=4,
            ),
        ),
    ],
    ids=["a-sliding-layer", "a-sliding-window", "soft-capped-scores", "an-encoder", "a-recurrent-layer"],
)  # fmt: skip
def test_models_that_do_more_than_plain_causal_attention_share_nothing(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    rows = family()
    expected = plain_loop(model, rows)
    engine = TorchScoreEngine(model, INFO)
    assert not engine.shares_prefixes
    np.testing.assert_allclose(engine.score(rows), expected, atol=1e-4)
    np.testing.assert_allclose(plain_loop(model, rows), expected, atol=1e-6)


def test_the_last_token_counts_even_if_it_is_the_padding_id():
    model = tiny_qwen(pad_token_id=2, eos_token_id=2)
    row = np.array([5, 6, 7, 2], np.int32)
    (score,) = TorchScoreEngine(model, INFO).score([row])
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([row.tolist()])).last_hidden_state[0, -1]
        expected = float(model.score(hidden))
    assert score == pytest.approx(expected, abs=1e-5)
    # Transformers' own pooling stops before it.
    assert score != pytest.approx(plain_loop(model, [row])[0], abs=1e-3)


def test_only_last_tokens_reach_the_head():
    model = tiny_qwen()
    engine = TorchScoreEngine(model, INFO)
    calls: list[int] = []
    model.score.register_forward_hook(lambda module, args, output: calls.append(output.shape[0]))
    engine.score(ragged([9, 5]))
    assert calls == []


def test_broken_weights_give_nan_rather_than_a_number():
    model = tiny_qwen()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    scores = TorchScoreEngine(model, INFO).score(ragged([4, 6]))
    assert all(math.isnan(score) for score in scores)


def load(folder, **changes) -> TorchScoreEngine:
    return TorchScoreEngine.load("scorers.tiny", ModelScorerSettings(model=str(folder), **changes))


def test_load_reads_the_model_its_normalisation_and_its_encoding(tmp_path):
    model = tiny_qwen()
    model.config.reward_mean = 1.5
    model.config.reward_std = 2.0
    model.config.reward_encoding = "continuation"
    model.save_pretrained(tmp_path / "tiny")
    engine = load(tmp_path / "tiny", max_sequence_tokens=16)
    assert engine.normalization == Normalization(mean=1.5, std=2.0)
    assert engine.normalization.apply(3.5) == 1.0
    assert engine.encoding == "continuation"
    assert engine.model.name == "tiny"
    assert engine.model.revision.startswith("sha256:")
    assert engine.model.max_sequence_tokens == 16
    rows = ragged([7])
    np.testing.assert_allclose(engine.score(rows), plain_loop(model, rows), atol=1e-5)


def test_a_bfloat16_model_keeps_a_float32_head(tmp_path):
    model = tiny_qwen()
    model.save_pretrained(tmp_path)
    engine = load(tmp_path, dtype="bfloat16")
    rows = ragged([30, 4, 17, 9])
    scores = np.array(engine.score(rows))
    assert np.abs(scores - plain_loop(model, rows)).max() < 0.5
    as_bfloat16 = torch.tensor(scores).bfloat16().double().numpy()
    assert (scores != as_bfloat16).any()


def test_more_labels_than_one_are_refused(tmp_path):
    tiny_qwen(num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"scorers\.tiny\.model: has 3 labels, allowed: .* 1 label"):
        load(tmp_path)


def test_a_language_model_without_a_head_is_refused(tmp_path):
    Qwen2ForCausalLM(tiny_qwen().config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"scorers\.tiny\.model: lacks the weights score\.weight"):
        load(tmp_path)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_a_normalisation_that_cannot_be_is_refused(mean, std):
    config = Qwen2Config(reward_mean=mean, reward_std=std)
    with pytest.raises(ValueError, match=r"m\.model: reward_mean is .*allowed: finite, and std above 0"):
        read_normalization("m.model", config)
