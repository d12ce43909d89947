"""Looks at the policy from outside while PPO trains it: held-out prompts, the hidden score, length.

Nothing that it finds goes back into training. Every answer says which weights drew it, so a look is placed at its step
exactly.
"""

import asyncio
import json
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from examples.steps.config import PipelineConfig
from examples.steps.generation import Answer, Tokenizer, answer_all
from examples.steps.sources import Gold
from steersman.client import SteersmanError


class Probe:
    """A thread that looks every few seconds, from entering the `with` block to leaving it.

    It writes one row for each step that it saw.

    Without a hidden score, or without prompts, it does nothing.
    """

    def __init__(
        self,
        address: str,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        gold: Gold | None,
        config: PipelineConfig,
        path: Path,
    ) -> None:
        self._address = address
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._gold = gold
        self._config = config
        self._path = path
        self._last_step = -1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="probe", daemon=True)

    def __enter__(self) -> "Probe":
        if self._gold is not None and self._prompts:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=60.0)

    def _run(self) -> None:
        while not self._stop.is_set():
            # The job's own errors tell of a policy that is away; a look may be missed.
            with suppress(SteersmanError):
                self._look()
            self._stop.wait(self._config.evaluation.probe_seconds)
        with suppress(SteersmanError):
            self._look()

    def _look(self) -> None:
        answers = asyncio.run(
            answer_all(
                self._address,
                self._tokenizer,
                self._prompts,
                max_tokens=self._config.max_response_tokens,
                temperature=self._config.temperature,
                seed=2_000_000,
            )
        )
        row = self._row([answer for (answer,) in answers])
        if row["step"] == self._last_step:
            return
        self._last_step = row["step"]
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _row(self, answers: Sequence[Answer]) -> dict[str, Any]:
        assert self._gold is not None
        num = len(answers)
        gold = sum(self._gold(answer.prompt, answer.text, answer.ended) for answer in answers) / num
        # Weights may change during a look: the middle one stands for it.
        step = sorted(answer.version.step for answer in answers)[num // 2]
        length = sum(len(answer.token_ids) for answer in answers) / num
        return {"step": step, "gold_reward": gold, "response_length": length, "num_prompts": num}
