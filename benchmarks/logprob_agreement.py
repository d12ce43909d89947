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
from steersman.trainer.checkpoint.models import lm_head, load_actor
from steersman.trainer.checkpoint.source import ModelSource
from steersman.trainer.stages.packed import batch_of, packing_step, states_at
from steersman.trainer.stages.placement import place

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
    """As the update computes old log-probs, in one pack."""
    placement = place("cpu", "float32")
    actor = placement.move(load_actor(ModelSource(path=str(model))))
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in sequences]
    batch = batch_of([row[:-1] for row in rows], placement.device, step=packing_step(actor))
    responses = [row[toymodel.PROMPT_TOKENS :] for row in rows]
    first = [start + toymodel.PROMPT_TOKENS - 1 for start in batch.starts_B]
    predicting_P = torch.cat([torch.arange(len(ids)) + start for start, ids in zip(first, responses, strict=True)])
    head = lm_head(actor)
    taken_P = logprobs_from_hidden(
        states_at(actor, batch, predicting_P),
        head.weight,
        torch.cat(responses),
        bias_V=head.bias,
        temperature=temperature,
    ).logprobs
    sizes = [len(ids) for ids in responses]
    return [row.numpy() for row in torch.split(taken_P, sizes)]
