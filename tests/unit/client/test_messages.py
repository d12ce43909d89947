"""Prompts, JSON facts, splitting, deadlines: what happens before a call is made."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.client.calls import Deadline
from steersman.client.policy import SampleAssembler, generate_request
from steersman.client.prompts import from_struct, prompt_to_proto, to_struct, token_array
from steersman.client.reward import item_to_proto
from steersman.client.splitting import split
from steersman.client.types import ChatMessage, ScoreItem
from steersman.v1 import policy_pb2
from steersman.wire.errors import Code, Reason, SteersmanError, queue_full

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_json_travels_unchanged(values: dict[str, Any]) -> None:
    assert from_struct(to_struct(values, "config")) == values


@given(
    st.lists(st.integers(0, 20), max_size=40),
    st.integers(1, 10),
    st.integers(1, 30),
)
def test_split_covers_all_items_in_order_within_the_limits(sizes: list[int], max_items: int, max_bytes: int) -> None:
    parts = split(sizes, max_items=max_items, max_bytes=max_bytes)
    assert [index for part in parts for index in part] == list(range(len(sizes)))
    for part in parts:
        assert 1 <= len(part) <= max_items
        assert len(part) == 1 or sum(sizes[index] for index in part) <= max_bytes


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("text", "text"),
        ([1, 2], "prompt_token_ids"),
        ((1, 2), "prompt_token_ids"),
        (np.array([1, 2], np.int64), "prompt_token_ids"),
        ([], "prompt_token_ids"),
        ([ChatMessage(role="user", content="hi")], "chat"),
        ([{"role": "user", "content": "hi"}], "chat"),
    ],
)
def test_a_prompt_goes_into_the_field_of_its_kind(prompt: Any, field: str) -> None:
    assert list(prompt_to_proto(prompt)) == [field]


@pytest.mark.parametrize("ids", [[-1], [2**31], [1.5], ["1"], [[1], [2]], [True, "x"]])
def test_what_is_no_list_of_token_ids_is_refused(ids: Any) -> None:
    with pytest.raises(SteersmanError, match="prompt is") as caught:
        token_array(ids, "prompt")
    assert caught.value.reason is Reason.INVALID_FIELD


def test_a_turn_needs_role_and_content_only() -> None:
    with pytest.raises(SteersmanError, match=r"prompt\[1\]"):
        prompt_to_proto([{"role": "user", "content": "hi"}, {"role": "user", "text": "hi"}])


@pytest.mark.parametrize(
    ("options", "field"),
    [({"top_k": "many"}, "sampling.top_k"), ({"num_samples": 2**40}, "sampling.num_samples"), ({"topp": 1}, "topp")],
)
def test_an_option_of_the_wrong_type_is_named(options: Any, field: str) -> None:
    with pytest.raises(SteersmanError, match=field):
        generate_request([1], policy_pb2.OUTPUT_MODE_DELTA, options)


def test_items_are_tokens_text_or_chat_but_no_mixture() -> None:
    chat = [ChatMessage(role="user", content="hi")]
    assert item_to_proto(ScoreItem(prompt=[], response=[1]), "items[0]").HasField("tokens")
    assert (
        item_to_proto(ScoreItem(prompt="a", response="b", timeout_seconds=0.5), "items[0]").timeout.nanos == 5 * 10**8
    )
    assert item_to_proto(ScoreItem(prompt=chat, response="b"), "items[0]").chat.response.role == "assistant"
    facts = item_to_proto(ScoreItem(prompt="a", response="b", context={"ground_truth": "42"}), "items[0]").context
    assert facts["ground_truth"] == "42"
    mixtures: list[Any] = [("a", [1]), ([1], "b"), (chat, [1]), ("a", chat[0]), ([1], chat[0])]
    for prompt, response in mixtures:
        with pytest.raises(SteersmanError, match=r"items\[3\]"):
            item_to_proto(ScoreItem(prompt=prompt, response=response), "items[3]")


def test_spans_of_one_version_are_joined_over_deltas() -> None:
    assembler = SampleAssembler(policy_pb2.GenerateRequest())
    for number, step in enumerate([1, 1, 2]):
        message = policy_pb2.GenerateResponse(token_ids=[number], logprobs=[-1.0])
        span = message.weight_versions.add(start=number, end=number + 1)
        span.version.step = step
        if number == 2:
            message.finish_reason = policy_pb2.FINISH_REASON_STOP
        sample = assembler.add(message)
    assert sample is not None
    assert [(s.version.step, s.start, s.end) for s in sample.weight_versions] == [(1, 0, 2), (2, 2, 3)]
    assembler.finish()


def test_only_a_full_queue_with_a_time_inside_the_deadline_is_waited_out() -> None:
    deadline = Deadline(10.0)
    assert deadline.wait_for(queue_full("the queue", 1, 0.5)) == 0.5
    errors = [
        queue_full("the queue", 1, 20.0),
        SteersmanError(None, "full", code=Code.RESOURCE_EXHAUSTED),
        SteersmanError(Reason.ENGINE_UNAVAILABLE, "starting", retry_after_seconds=0.1),
    ]
    for error in errors:
        with pytest.raises(SteersmanError) as caught:
            deadline.wait_for(error)
        assert caught.value is error
    with pytest.raises(ValueError, match="timeout"):
        Deadline(0.0)
