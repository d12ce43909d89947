"""What is loaded beside the event loop, and what becomes of it when nobody waits."""

import asyncio
import threading

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from steersman.reward.build import digest_tokenizer, on_daemon_thread

WAIT_S = 10


def keep(kept: list[str]):
    arrived = threading.Event()

    def discard(result: str) -> None:
        kept.append(result)
        arrived.set()

    return discard, arrived


async def test_a_result_or_an_error_comes_back():
    kept: list[str] = []
    discard, _ = keep(kept)
    assert await asyncio.wait_for(on_daemon_thread(lambda: "made", discard, "t"), WAIT_S) == "made"
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(on_daemon_thread(lambda: 1 // 0, discard, "t"), WAIT_S)
    assert kept == []


async def test_a_result_that_nobody_waits_for_is_discarded():
    kept: list[str] = []
    discard, arrived = keep(kept)
    gate = threading.Event()

    def work() -> str:
        assert gate.wait(WAIT_S)
        return "late"

    task = asyncio.create_task(on_daemon_thread(work, discard, "t"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.set()
    assert await asyncio.to_thread(arrived.wait, WAIT_S)
    assert kept == ["late"]


async def test_a_result_that_comes_with_the_cancellation_is_discarded():
    kept: list[str] = []
    discard, arrived = keep(kept)
    begun = threading.Event()

    def work() -> str:
        begun.set()
        return "at once"

    task = asyncio.create_task(on_daemon_thread(work, discard, "t"))
    await asyncio.sleep(0)
    assert begun.wait(WAIT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(arrived.wait, WAIT_S)
    assert kept == ["at once"]


def tokenizer(*words: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_tokenizers_are_the_same_if_ids_mean_the_same():
    one = digest_tokenizer(tokenizer("<unk>", "a", "b"))
    assert digest_tokenizer(tokenizer("<unk>", "a", "b")) == one
    assert digest_tokenizer(tokenizer("<unk>", "b", "a")) != one
    assert digest_tokenizer(tokenizer("<unk>", "a", "b", "c")) != one
