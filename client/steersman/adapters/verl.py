"""A reward function for verl: `custom_reward_function.path` may name this file, `name` one of its functions.

verl calls `compute_score(data_source, solution_str, ground_truth, extra_info)` for each sample. The service is named by
the environment variable `STEERSMAN_REWARD` (host:port; default 127.0.0.1:50053), the scorer by `STEERSMAN_SCORER`. A
sample that cannot be scored raises: verl has no value for "no reward", and zero would be trained on.
"""

import asyncio
import os
from collections.abc import Mapping
from functools import cache
from typing import Any, Final
from weakref import WeakKeyDictionary

from steersman.client import AsyncRewardClient, RewardClient, ScoreItem

DEFAULT_TARGET: Final = "127.0.0.1:50053"


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None
) -> float:
    """The score of one solution. Raises SteersmanError if there is none."""
    item = _item(data_source, solution_str, ground_truth, extra_info)
    (score,) = _client(_target()).score([item], scorer=_scorer())
    return score.unwrap()


async def compute_score_async(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None
) -> float:
    """The score of one solution; calls of many samples run side by side and are batched by the service."""
    item = _item(data_source, solution_str, ground_truth, extra_info)
    (score,) = await _async_client(_target()).score([item], scorer=_scorer())
    return score.unwrap()


def _item(data_source: str, solution: str, ground_truth: Any, extra_info: Mapping[str, Any] | None) -> ScoreItem:
    extra = dict(extra_info or {})
    prompt = extra.pop("prompt", None) or extra.pop("question", None) or ""
    context = {"data_source": data_source, "ground_truth": ground_truth, "extra_info": extra}
    return ScoreItem(prompt=prompt, response=solution, context=context)


def _target() -> str:
    return os.environ.get("STEERSMAN_REWARD", DEFAULT_TARGET)


def _scorer() -> str:
    return os.environ.get("STEERSMAN_SCORER", "")


@cache
def _client(target: str) -> RewardClient:
    return RewardClient(target)


# A channel belongs to the event loop on which it was opened.
_async_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, AsyncRewardClient]] = WeakKeyDictionary()


def _async_client(target: str) -> AsyncRewardClient:
    clients = _async_clients.setdefault(asyncio.get_running_loop(), {})
    if target not in clients:
        clients[target] = AsyncRewardClient(target)
    return clients[target]
