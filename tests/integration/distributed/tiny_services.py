"""A policy that draws the same tokens whatever its weights, and judges to match: every run sees the same rollouts."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import torch
from fake_weight_service import FakeWeightService, manifest
from tiny_model import EOS, MODEL, VOCABULARY, write_tokenizer
from torch import nn

from steersman.trainer.checkpoint.models import load_actor, load_scalar_head, save_model, score_head
from steersman.trainer.checkpoint.source import ModelSource
from steersman.v1 import (
    policy_pb2,
    policy_pb2_grpc,
    reference_pb2,
    reference_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
    types_pb2,
    weights_pb2_grpc,
)
from steersman.wire.convert import version_to_proto
from steersman.wire.status import status_to_proto
from steersman.wire.tensors import from_ragged, from_tensor, to_ragged


class Services(
    policy_pb2_grpc.PolicyServiceServicer,
    reward_pb2_grpc.RewardServiceServicer,
    reference_pb2_grpc.ReferenceServiceServicer,
):
    """All services on one port. From `hold_after` prompts on, nothing is drawn until `flow` is set."""

    def __init__(self) -> None:
        actor = load_actor(ModelSource(config=MODEL))
        shapes = {name: (tuple(p.shape), "FLOAT32") for name, p in actor.named_parameters()}
        self.weights = FakeWeightService(manifest(shapes), max_chunk_bytes=4096)
        self.num_prompts = 0
        self.hold_after = 10**9
        self.flow = asyncio.Event()
        self.holding = asyncio.Event()
        self.target = ""
        self._server: grpc.aio.Server

    async def start(self) -> None:
        self._server = grpc.aio.server()
        weights_pb2_grpc.add_WeightServiceServicer_to_server(self.weights, self._server)
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(self, self._server)
        reward_pb2_grpc.add_RewardServiceServicer_to_server(self, self._server)
        reference_pb2_grpc.add_ReferenceServiceServicer_to_server(self, self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)

    def restart(self, *, hold_after: int = 10**9) -> None:
        """As new, for the next attempt of a run."""
        self.weights.restart()
        self.num_prompts, self.hold_after = 0, hold_after
        self.flow.clear()
        self.holding.clear()

    async def GetModel(self, request: Any, context: Any) -> Any:
        model = types_pb2.ModelInfo(name="m", max_sequence_tokens=64, dtype=1)
        if isinstance(request, policy_pb2.PolicyServiceGetModelRequest):
            return policy_pb2.PolicyServiceGetModelResponse(model=model)
        return reference_pb2.ReferenceServiceGetModelResponse(model=model)

    async def Generate(self, request: Any, context: Any) -> Any:
        self.num_prompts += 1
        if self.num_prompts > self.hold_after:
            self.holding.set()
            await self.flow.wait()
        chance = random.Random(str(list(request.prompt_token_ids.ids)))
        for index in range(request.sampling.num_samples):
            ids = [chance.randrange(3, VOCABULARY) for _ in range(chance.randrange(2, 9))] + [EOS]
            response = policy_pb2.GenerateResponse(
                sample_index=index,
                token_ids=ids,
                logprobs=[-3.0 - 0.1 * chance.random() for _ in ids],
                finish_reason=policy_pb2.FINISH_REASON_STOP,
            )
            response.weight_versions.add(version=version_to_proto(self.weights.active), start=0, end=len(ids))
            yield response

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        results = [
            reward_pb2.ItemScore(
                id=item.id,
                status=status_to_proto(None),
                score=float(np.mean([token % 3 for token in item.tokens.response.ids])),
                scorer="s",
            )
            for item in request.items
        ]
        return reward_pb2.ScoreResponse(results=results)

    async def ComputeLogprobs(self, request: Any, context: Any) -> reference_pb2.ComputeLogprobsResponse:
        rows = from_ragged(request.token_ids, "token_ids", np.int32)
        lengths = from_tensor(request.prompt_lengths, "prompt_lengths", np.int32)
        answer = [(-3.2 - 0.01 * row[length:]).astype(np.float32) for row, length in zip(rows, lengths, strict=True)]
        return reference_pb2.ComputeLogprobsResponse(logprobs=to_ragged(answer, np.float32))


def write_reward_model(folder: Path) -> str:
    """One with a scale of its own."""
    model = load_scalar_head(ModelSource(config=MODEL), seed=4)
    nn.init.normal_(score_head(model).weight, generator=torch.Generator().manual_seed(4))
    save_model(folder, model, files={"reward_normalization.json": {"version": 1, "mean": 2.5, "std": 1.5}})
    return str(folder)


def ppo_settings(folder: Path, target: str, **changes: Any) -> dict[str, Any]:
    """A job whose batches do not share out evenly."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w{3 + n % 28} w{4 + n % 20} w5"}) + "\n" for n in range(14)))
    rate = {"learning_rate": 5e-3, "schedule": "constant"}
    return {
        "actor": {"config": MODEL},
        "critic": {"path": write_reward_model(folder / "reward")},
        "tokenizer": write_tokenizer(folder / "tokenizer"),
        "prompts": {"files": [str(prompts)]},
        "max_prompt_tokens": 8,
        "services": {"policies": [target], "reference": target, "reward": target, "give_up_seconds": 120},
        "sampling": {"max_tokens": 16, "samples_per_prompt": 1},
        "prompts_per_step": 7,
        "total_steps": 4,
        "save_every_steps": 2,
        "max_staleness": 0,
        "micro_batch_tokens": 40,
        "num_epochs": 2,
        "num_minibatches": 2,
        "optimizer": rate,
        "critic_optimizer": rate,
        "kl": {"coefficient": 0.05, "target": 4.0, "horizon": 50},
        "device": "cpu",
        "num_threads": 1,
    } | changes
