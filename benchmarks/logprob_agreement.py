"""Log-probs of the same tokens under the same weights: policy (vLLM), reference and trainer, all float32.

The policy draws responses through its service and reports the log-prob of every token; the reference service and the
trainer's own computation then say what they make of the very same tokens. The figure is the largest difference between
any two of the three, over all tokens and two temperatures. The model's logits are scaled up, so that its distribution
is about as peaked as that of a trained one: near-uniform distributions agree too easily.
"""

from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import toymodel
from benchmarks.context import Context, Measured
from benchmarks.stack import CORES, Service, running, thread_environment
from steersman.client import PolicyClient, ReferenceClient
from steersman.trainer.algorithm.logprobs import logprobs_from_hidden
from steersman.trainer.checkpoint.models import hidden_states, lm_head, load_actor
from steersman.trainer.checkpoint.source import ModelSource

RESPONSE_TOKENS = 64
SAMPLES_PER_PROMPT = 4
TEMPERATURES = (1.0, 0.7)
SHARPNESS = 8.0

Rows = list[NDArray[np.float32]]


def run(context: Context) -> Measured:
    """Measures `logprob_max_abs_diff_fp32`."""
    policy = toymodel.build_policy(seed=0, mean_tokens=None, limit=RESPONSE_TOKENS)
    policy.model.norm.weight.data *= SHARPNESS
    model = toymodel.save(policy, context.directory / "model")
    prompts = toymodel.encode(toymodel.build_prompts(2 if context.quick else 32, toymodel.PROMPT_TOKENS, seed=2))
    services = [
        Service(
            name="policy",
            settings={"model": str(model), "dtype": "float32", "kv_cache_mib": 256},
            environment=thread_environment(CORES),
        ),
        Service(
            name="reference",
            settings={"model": str(model), "dtype": "float32"},
            environment=thread_environment(CORES),
        ),
    ]
    differences: dict[str, list[float]] = {}
    mean_logprobs: list[float] = []
    num_tokens = 0
    with running(services, context.directory) as stack:
        for temperature in TEMPERATURES:
            found = _three_ways(prompts, temperature, model, stack.addresses["policy"], stack.addresses["reference"])
            num_tokens += sum(len(row) for row in found["policy"])
            mean_logprobs.append(float(np.mean(np.concatenate(found["policy"]))))
            for one, other in combinations(found, 2):
                difference = np.abs(np.concatenate(found[one]) - np.concatenate(found[other]))
                differences.setdefault(f"{one}-{other}", []).extend(difference.tolist())
    return Measured(
        figures={"logprob_max_abs_diff_fp32": max(max(values) for values in differences.values())},
        detail={
            "num_tokens": num_tokens,
            "temperatures": TEMPERATURES,
            "mean_logprobs": mean_logprobs,
            "pairs": {
                pair: {"max": max(values), "mean": float(np.mean(values))} for pair, values in differences.items()
            },
        },
    )


def _three_ways(
    prompts: list[list[int]], temperature: float, model: Path, policy_address: str, reference_address: str
) -> dict[str, Rows]:
    sequences: list[NDArray[np.int32]] = []
    sampled: Rows = []
    with PolicyClient(policy_address) as policy:
        for prompt in prompts:
            for sample in policy.generate(
                prompt,
                num_samples=SAMPLES_PER_PROMPT,
                temperature=temperature,
                max_tokens=RESPONSE_TOKENS,
            ):
                sequences.append(np.concatenate([np.array(prompt, np.int32), sample.token_ids]))
                sampled.append(sample.logprobs)
    with ReferenceClient(reference_address) as reference:
        answered = reference.logprobs(sequences, toymodel.PROMPT_TOKENS, temperature=temperature)
    return {
        "policy": sampled,
        "reference": answered.logprobs,
        "trainer": _trainer_logprobs(model, sequences, temperature),
    }


@torch.no_grad()
def _trainer_logprobs(model: Path, sequences: list[NDArray[np.int32]], temperature: float) -> Rows:
    """As the update computes old log-probs, in one right-padded batch."""
    actor = load_actor(ModelSource(path=str(model)))
    ids_BT = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
    for row, ids in enumerate(sequences):
        ids_BT[row, : len(ids)] = torch.from_numpy(ids)
    head = lm_head(actor)
    states_BTD = hidden_states(actor, ids_BT[:, :-1])[:, toymodel.PROMPT_TOKENS - 1 :]
    targets_BT = ids_BT[:, toymodel.PROMPT_TOKENS :]
    taken_BT = logprobs_from_hidden(
        states_BTD, head.weight, targets_BT, bias_V=head.bias, temperature=temperature
    ).logprobs
    lengths = [len(ids) - toymodel.PROMPT_TOKENS for ids in sequences]
    return [row[:length].numpy() for row, length in zip(taken_BT, lengths, strict=True)]
