"""A reward function for TRL's online trainers (`GRPOTrainer`, `RLOOTrainer`): scores come from a reward service.

    trainer = GRPOTrainer(..., reward_funcs=[SteersmanReward("reward:50053")])

TRL calls a reward function with lists (`prompts`, `completions`, `completion_ids`, and every other column of the data
set) and takes None for "no reward": a completion that could not be scored is left out, not trained on as zero.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from steersman.client import ChatMessage, Credentials, Overlength, RewardClient, ScoreItem

# What TRL passes beside the columns of the data set; not facts about the sample.
_NOT_COLUMNS = frozenset({"completion_ids", "trainer_state", "log_extra", "log_metric", "environments"})


class SteersmanReward:
    """Scores completions with a reward service. Picklable; the channel is opened at the first call.

    Args:
        target: host:port of the service, or what the SDK allows beside it.
        scorer: name of the scorer. Default: the server's default.
        columns: columns of the data set that go to the scorer as context. Default: none.
        overlength: what to do with items longer than the scorer accepts.
        timeout: seconds for a whole batch.
        credentials: for a service beyond loopback.

    Calling it raises SteersmanError if the service cannot be reached within the timeout, or does not know the scorer.
    """

    def __init__(
        self,
        target: str,
        *,
        scorer: str = "",
        columns: Sequence[str] = (),
        overlength: Overlength = Overlength.FAIL,
        timeout: float = 120.0,
        credentials: Credentials | None = None,
    ) -> None:
        self.target = target
        self.scorer = scorer
        self.columns = tuple(columns)
        self.overlength = overlength
        self.timeout = timeout
        self.credentials = credentials
        self.__name__ = scorer or "steersman"  # TRL logs each reward under the name of its function
        self._client: RewardClient | None = None

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One reward a completion, None where it could not be scored. Text or conversational, as TRL has it."""
        missing = [name for name in self.columns if name not in columns or name in _NOT_COLUMNS]
        if missing:
            known = ", ".join(sorted(columns.keys() - _NOT_COLUMNS)) or "none"
            raise ValueError(f"columns is {list(self.columns)}, allowed: columns of the data set ({known})")
        items = [
            _item(prompt, completion, {name: columns[name][index] for name in self.columns})
            for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        if self._client is None:
            self._client = RewardClient(self.target, credentials=self.credentials)
        scores = self._client.score(items, scorer=self.scorer, overlength=self.overlength, timeout=self.timeout)
        return [score.value for score in scores]

    def close(self) -> None:
        """Closes the channel, if one was opened."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None}


def _item(prompt: Any, completion: Any, context: Mapping[str, Any]) -> ScoreItem:
    """A conversational completion is a list of turns, of which the last is scored."""
    if isinstance(completion, str):
        return ScoreItem(prompt=prompt, response=completion, context=context)
    *between, last = completion
    turns = [ChatMessage(role=turn["role"], content=turn["content"]) for turn in (*prompt, *between)]
    return ScoreItem(prompt=turns, response=ChatMessage(role=last["role"], content=last["content"]), context=context)
