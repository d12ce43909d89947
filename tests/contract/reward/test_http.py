"""The HTTP front over real sockets: each dialect with its documented shapes, and every kind of bad body."""

import asyncio
import json
import math
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from steersman.reward.function_scorer import FunctionScorer
from steersman.reward.handler import RewardHandler
from steersman.reward.http.app import make_app
from steersman.reward.http.server import HttpServer, start_http
from steersman.reward.plugin import ScorerInput
from steersman.reward.settings import FunctionScorerSettings
from steersman.serving.metrics import Metrics
from steersman.serving.security.gate import Gate
from steersman.serving.server import PortInUse

MAX_BODY = 4096
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2?"}]


def length(items: Sequence[ScorerInput]) -> list[float | None]:
    """The length of the response; None for one that says so."""
    return [None if item.response == "bad" else float(len(item.response)) for item in items]


def told(items: Sequence[ScorerInput]) -> list[float | None]:
    """1 if the response is the label of the context."""
    return [float(item.response == item.context.get("label")) for item in items]


def prompts(items: Sequence[ScorerInput]) -> list[float | None]:
    """The length of the prompt, and of the turns before it times 100."""
    return [len(item.prompt) + 100.0 * len(item.messages) for item in items]


@dataclass
class Front:
    """A running front and its metrics."""

    server: HttpServer
    metrics: Metrics
    release: threading.Event

    async def call(
        self, path: str, body: Any = None, *, raw: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON and headers of the answer."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self.server.address}{path}", data, headers or {})
        request.add_header("Content-Type", "application/json")

        def ask() -> tuple[int, Any, dict[str, str]]:
            try:
                with urllib.request.urlopen(request, timeout=20) as response:
                    return response.status, json.loads(response.read()), dict(response.headers)
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, json.loads(error.read() or b"null"), dict(error.headers)

        return await asyncio.to_thread(ask)


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    release = threading.Event()

    def held(items: Sequence[ScorerInput]) -> list[float | None]:
        release.wait(20)
        return [1.0 for _ in items]

    functions = {"length": length, "told": told, "prompts": prompts, "held": held}
    scorers = {
        name: FunctionScorer(name, function, FunctionScorerSettings(function="m:f"))
        for name, function in functions.items()
    }
    handler, metrics = RewardHandler(scorers, "length"), Metrics("reward")
    app = make_app(handler, metrics, Gate(), max_body_bytes=MAX_BODY, timeout_seconds=2.0)
    server = await start_http(app, host="127.0.0.1", port=0, max_concurrent_calls=16, grace_seconds=5)
    yield Front(server, metrics, release)
    release.set()
    await server.stop()
    await handler.close()


async def test_openrlhf(front):
    body = {"query": ["<u>hi<a>yes", "other"], "prompts": ["<u>hi<a>", "<u>"], "labels": ["yes", None]}
    status, answer, _ = await front.call("/get_reward", body)
    assert (status, answer) == (
        200,
        {"rewards": [3.0, 5.0], "scores": [3.0, 5.0], "extra_logs": {"num_tokens": [0, 0]}},
    )
    _, answer, _ = await front.call("/get_reward?scorer=told", body)
    assert answer["rewards"] == [1.0, 0.0]
    _, answer, _ = await front.call("/get_reward", {"query": "alone", "prompts": None})
    assert answer["rewards"] == [5.0]


async def test_openrlhf_takes_more_than_one_batch(front):
    queries = ["x" * (n % 3) + "y" for n in range(1500)]
    status, answer, _ = await front.call("/get_reward?scorer=length", {"query": ["y"] * 500})
    assert (status, len(answer["rewards"])) == (200, 500)
    assert len(json.dumps(queries)) > MAX_BODY
    status, answer, _ = await front.call("/get_reward", {"query": queries})
    assert (status, answer["error"]["reason"]) == (413, "REQUEST_TOO_LARGE")


async def test_slime(front):
    assert (await front.call("/slime", {"prompt": "2+2?", "response": "four", "label": "four"}))[:2] == (200, 4.0)
    _, score, _ = await front.call("/slime?scorer=told", {"prompt": MESSAGES, "response": "4", "label": "4"})
    assert score == 1.0
    _, score, _ = await front.call("/slime?scorer=prompts", {"prompt": MESSAGES, "response": "4", "metadata": {}})
    assert score == len("2+2?") + 100.0 * len(MESSAGES)


async def test_vllm_classify_with_and_without_activation(front):
    _, answer, _ = await front.call("/classify", {"input": ["ab", "abcd"], "use_activation": False})
    assert (answer["object"], answer["model"]) == ("list", "length")
    assert [(one["index"], one["probs"], one["num_classes"]) for one in answer["data"]] == [
        (0, [2.0], 1),
        (1, [4.0], 1),
    ]
    assert set(answer["usage"]) == {"prompt_tokens", "total_tokens", "completion_tokens"}
    _, answer, _ = await front.call("/classify", {"input": "ab"})
    assert answer["data"][0]["probs"] == [pytest.approx(1 / (1 + math.exp(-2)))]
    chat = [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": "four"}]}]
    _, answer, _ = await front.call("/classify", {"model": "length", "messages": chat, "use_activation": False})
    assert (answer["model"], answer["data"][0]["probs"]) == ("length", [4.0])


async def test_nemo_gym_gives_the_body_back_with_a_reward(front):
    output = [
        {"type": "reasoning", "summary": []},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "four"}, {"type": "refusal", "refusal": "no"}],
        },
    ]
    body = {
        "responses_create_params": {"input": [{"role": "developer", "content": "be brief"}, *MESSAGES[1:]]},
        "response": {"id": "r", "output": output},
        "label": "four",
    }
    status, answer, _ = await front.call("/verify?scorer=told", body)
    assert (status, answer) == (200, {**body, "reward": 1.0})
    _, answer, _ = await front.call("/verify?scorer=prompts", body)
    assert answer["reward"] == len("2+2?") + 200.0


async def test_an_item_that_fails_fails_the_answer_which_has_the_others_scores(front):
    status, answer, _ = await front.call("/get_reward", {"query": ["good", "bad", "fine!"]})
    assert status == 500
    error = answer["error"]
    assert error["reason"] == "SCORER_FAILED"
    assert error["scores"] == [4.0, None, 5.0]
    assert [(item["index"], item["reason"]) for item in error["items"]] == [(1, "SCORER_FAILED")]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/get_reward", {}, "query"),
        ("/get_reward", {"query": []}, "body"),
        ("/get_reward", {"query": [1]}, "query"),
        ("/get_reward", {"query": ["a", ""]}, "items[1]"),
        ("/get_reward", {"query": ["a"], "prompts": ["a", "b"]}, "prompts"),
        ("/get_reward", {"query": ["a"], "labels": []}, "labels"),
        ("/get_reward", ["a"], "body"),
        ("/slime", {"prompt": "a"}, "response"),
        ("/slime", {"prompt": "a", "response": ""}, "items[0]"),
        ("/slime", {"prompt": [{"role": "robot", "content": "x"}], "response": "a"}, "role"),
        ("/slime", {"prompt": [], "response": "a"}, "items[0]"),
        ("/classify", {}, "input"),
        ("/classify", {"input": "a", "messages": MESSAGES}, "input"),
        ("/classify", {"input": []}, "items[0]"),
        ("/classify", {"input": [[2**40]]}, "input[0]"),
        ("/classify", {"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ("/verify", {"responses_create_params": {"input": "a"}}, "response"),
        ("/verify", {"responses_create_params": {"input": "a"}, "response": {"output": []}}, "response.output"),
        (
            "/verify",
            {
                "responses_create_params": {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
                "response": {"output": [{"type": "message", "content": "a"}]},
            },
            "responses_create_params.input.0",
        ),
    ],
)
async def test_a_bad_body_names_the_field(front, path, body, field):
    status, answer, _ = await front.call(path, body)
    assert status == 400
    assert answer["error"]["reason"] == "INVALID_FIELD"
    assert field in answer["error"]["message"] + str(answer["error"]["fields"])


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b'{"query": NaN}', b"[" * 4000])
async def test_what_is_not_json_is_said(front, raw):
    status, answer, _ = await front.call("/get_reward", raw=raw)
    assert (status, answer["error"]["reason"]) == (400, "INVALID_FIELD")
    assert (await front.call("/get_reward", {"query": "still here"}))[0] == 200


async def test_an_unknown_scorer_is_told_the_known_ones(front):
    status, answer, _ = await front.call("/get_reward?scorer=none", {"query": "a"})
    assert (status, answer["error"]["reason"]) == (404, "NOT_FOUND")
    assert "length" in answer["error"]["message"]


async def test_a_call_that_takes_too_long_ends(front):
    status, answer, _ = await front.call("/slime?scorer=held", {"prompt": "a", "response": "b"})
    assert (status, answer["error"]["reason"]) == (504, "DEADLINE_EXCEEDED")


async def test_health_scorers_request_ids_and_metrics(front):
    assert (await front.call("/health"))[:2] == (200, {"status": "ok"})
    _, answer, _ = await front.call("/scorers")
    assert [one["name"] for one in answer["scorers"] if one["is_default"]] == ["length"]
    _, _, headers = await front.call("/slime", {"prompt": "a", "response": "b"}, headers={"X-Request-Id": "mine-1"})
    assert headers["x-request-id"] == "mine-1"
    await front.call("/slime", {})
    count = front.metrics.registry.get_sample_value
    assert count("steersman_rpc_seconds_count", {"method": "POST /slime", "code": "OK"}) == 1
    assert count("steersman_rpc_seconds_count", {"method": "POST /slime", "code": "INVALID_ARGUMENT"}) == 1


async def test_a_caller_who_goes_away_takes_its_items_along(front):
    host, port = front.server.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = b'{"prompt": "a", "response": "b"}'
    writer.write(b"POST /slime?scorer=held HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    await writer.drain()
    writer.close()
    await reader.read()
    count = front.metrics.registry.get_sample_value
    async with asyncio.timeout(10):
        while not count("steersman_rpc_seconds_count", {"method": "POST /slime", "code": "CANCELLED"}):
            await asyncio.sleep(0.02)


async def test_a_port_in_use_is_said(front):
    host, port = front.server.address.split(":")
    with pytest.raises(PortInUse):
        await start_http(
            front.server._server.config.app, host=host, port=int(port), max_concurrent_calls=1, grace_seconds=1
        )
