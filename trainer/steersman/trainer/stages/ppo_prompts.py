"""The prompts of PPO, batch by batch."""

import numpy as np
from transformers import PreTrainedTokenizerBase

from steersman.trainer.data.encode import Encoder
from steersman.trainer.data.load import load_prompts
from steersman.trainer.data.order import EpochOrder
from steersman.trainer.data.settings import DataSettings
from steersman.trainer.rollout.types import Prompt
from steersman.trainer.stages.ppo_config import PpoConfig


class PromptStream:
    """The prompts of each step: a function of the seed and the step."""

    def __init__(
        self,
        data: DataSettings,
        config: PpoConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        salt: int = 0,
    ) -> None:
        records, _ = load_prompts(data)
        encoder = Encoder(
            tokenizer=tokenizer,
            max_prompt_tokens=config.max_prompt_tokens,
            max_response_tokens=config.sampling.max_tokens,
            transcript=config.transcript,
        )
        self._ids = encoder.prompts([record.prompt for record in records])
        self._texts = [record.prompt if isinstance(record.prompt, str) else "" for record in records]
        self._order = EpochOrder(len(records), batch_size=batch_size, seed=config.seed + salt)

    def batch(self, step: int) -> list[Prompt]:
        """The prompts of `step`, counted from 0."""
        return [
            Prompt(index=index, token_ids=np.array(self._ids[record], np.int32), text=self._texts[record])
            for index, record in enumerate(self._order.batch(step))
        ]
