"""The command against servers: what it prints, what it writes, how it fails."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from typer.testing import CliRunner, Result

from steersman.cli.main import app
from steersman.v1 import (
    policy_pb2,
    policy_pb2_grpc,
    reference_pb2,
    reference_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
    types_pb2,
)
from steersman.wire.errors import FieldViolation, Reason, SteersmanError
from steersman.wire.status import status_to_proto
from steersman.wire.tensors import from_ragged, to_ragged

MODEL = types_pb2.ModelInfo(name="tiny", dtype=types_pb2.DATA_TYPE_FLOAT32, max_sequence_tokens=64)


class FakePolicy(policy_pb2_grpc.PolicyServiceServicer):
    async def GetModel(self, request: Any, context: Any) -> policy_pb2.PolicyServiceGetModelResponse:
        model = types_pb2.ModelInfo(name="tiny", dtype=types_pb2.DATA_TYPE_FLOAT32, max_sequence_tokens=64)
        model.weight_version.run_id, model.weight_version.step = "run", 7
        return policy_pb2.PolicyServiceGetModelResponse(model=model)

    async def Generate(self, request: policy_pb2.GenerateRequest, context: Any) -> Any:
        kind = request.WhichOneof("prompt")
        said = {"text": request.text, "chat": " / ".join(f"{m.role}: {m.content}" for m in request.chat.messages)}
        for index in range(request.sampling.num_samples):
            yield policy_pb2.GenerateResponse(
                sample_index=index,
                token_ids=[4, 5],
                logprobs=[-0.5, -1.0],
                text=f"you said {said[kind]}" if request.return_text else "",
                finish_reason=policy_pb2.FINISH_REASON_STOP,
                model=MODEL,
            )


class FakeReference(reference_pb2_grpc.ReferenceServiceServicer):
    async def ComputeLogprobs(self, request: Any, context: Any) -> reference_pb2.ComputeLogprobsResponse:
        rows = from_ragged(request.token_ids, "token_ids", "i4")
        answer = to_ragged([[-0.25] * (len(row) - 1) for row in rows], "f4")
        return reference_pb2.ComputeLogprobsResponse(logprobs=answer, entropies=answer, model=MODEL)

    async def GetModel(self, request: Any, context: Any) -> reference_pb2.ReferenceServiceGetModelResponse:
        return reference_pb2.ReferenceServiceGetModelResponse(model=MODEL)


class FakeReward(reward_pb2_grpc.RewardServiceServicer):
    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        results = []
        for item in request.items:
            if item.text.response == "too long":
                status = status_to_proto(SteersmanError(Reason.SEQUENCE_TOO_LONG, "9 tokens, allowed: 8"))
                results.append(reward_pb2.ItemScore(id=item.id, status=status))
            else:
                score = len(item.text.response)
                results.append(reward_pb2.ItemScore(id=item.id, status=status_to_proto(None), score=score))
        return reward_pb2.ScoreResponse(results=results)

    async def ListScorers(self, request: Any, context: Any) -> reward_pb2.ListScorersResponse:
        scorer = reward_pb2.Scorer(name="length", kind=reward_pb2.SCORER_KIND_FUNCTION, is_default=True)
        return reward_pb2.ListScorersResponse(scorers=[scorer])


class FakeTrainer(trainer_pb2_grpc.TrainerServiceServicer):
    """A job runs two steps, then succeeds, or fails if its settings say so."""

    def __init__(self, refuse: Any) -> None:
        self.refuse = refuse
        self.spec = trainer_pb2.JobSpec(kind=trainer_pb2.JOB_KIND_PPO)
        self.state = trainer_pb2.JOB_STATE_RUNNING

    def job(self) -> trainer_pb2.Job:
        failed = self.state == trainer_pb2.JOB_STATE_FAILED
        error = "out of memory" if failed else ""
        return trainer_pb2.Job(id="my-job", spec=self.spec, state=self.state, run_directory="runs/my-job", error=error)

    async def CreateJob(self, request: trainer_pb2.CreateJobRequest, context: Any) -> trainer_pb2.CreateJobResponse:
        if "stepz" in request.spec.config.fields:
            violations = [
                FieldViolation(field="spec.config.stepz", description="no such setting"),
                FieldViolation(field="spec.config.lr", description="is -1, allowed: above 0"),
            ]
            error = SteersmanError(Reason.INVALID_FIELD, "2 bad settings", violations=violations)
            await self.refuse(context, error)
        self.spec = request.spec
        objects = f"kind: Job\nqueue: {request.spec.resources.queue_name}\n" if request.validate_only else ""
        return trainer_pb2.CreateJobResponse(job=self.job(), objects_yaml=objects)

    async def GetJob(self, request: Any, context: Any) -> trainer_pb2.GetJobResponse:
        return trainer_pb2.GetJobResponse(job=self.job())

    async def ListJobs(self, request: Any, context: Any) -> trainer_pb2.ListJobsResponse:
        return trainer_pb2.ListJobsResponse(jobs=[self.job()])

    async def CancelJob(self, request: Any, context: Any) -> trainer_pb2.CancelJobResponse:
        self.state = trainer_pb2.JOB_STATE_CANCELLING
        return trainer_pb2.CancelJobResponse(job=self.job())

    async def ReadJobLogs(
        self, request: trainer_pb2.ReadJobLogsRequest, context: Any
    ) -> trainer_pb2.ReadJobLogsResponse:
        lines = ["step 1", "step 2", "done"]
        begin = int(request.page_token or max(0, len(lines) - (request.tail_lines or len(lines))))
        return trainer_pb2.ReadJobLogsResponse(
            lines=lines[begin : begin + 1], next_page_token=str(begin + 1), ended=begin + 1 >= len(lines)
        )

    async def WatchJob(self, request: Any, context: Any) -> Any:
        progress = trainer_pb2.JobProgress(step=1, total_steps=2, message="waits for policy")
        yield trainer_pb2.WatchJobResponse(sequence=1, progress=progress)
        metrics = trainer_pb2.StepMetrics(step=1, values={"objective/kl": 0.125, "seconds": 3.0})
        yield trainer_pb2.WatchJobResponse(sequence=2, metrics=metrics)
        fail = "fail" in self.spec.config.fields
        self.state = trainer_pb2.JOB_STATE_FAILED if fail else trainer_pb2.JOB_STATE_SUCCEEDED
        change = trainer_pb2.JobStateChange(state=self.state, error="out of memory" if fail else "")
        yield trainer_pb2.WatchJobResponse(sequence=3, state_change=change)


@pytest.fixture
async def steersman(serve: Any, refuse: Any) -> Callable[..., Any]:
    """Runs the command with the addresses of the fakes in the environment."""
    adds = {
        "POLICY": (policy_pb2_grpc.add_PolicyServiceServicer_to_server, FakePolicy()),
        "REFERENCE": (reference_pb2_grpc.add_ReferenceServiceServicer_to_server, FakeReference()),
        "REWARD": (reward_pb2_grpc.add_RewardServiceServicer_to_server, FakeReward()),
        "TRAINER": (trainer_pb2_grpc.add_TrainerServiceServicer_to_server, FakeTrainer(refuse)),
    }
    environment = {}
    for name, (add, servicer) in adds.items():
        health = HealthServicer()
        await health.set("", health_pb2.HealthCheckResponse.SERVING)

        def add_both(servicer: Any, server: Any, add: Any = add, health: Any = health) -> None:
            add(servicer, server)
            health_pb2_grpc.add_HealthServicer_to_server(health, server)

        environment[f"STEERSMAN_{name}_ADDRESS"] = await serve(add_both, servicer)

    async def run(*arguments: str, stdin: str | None = None) -> Result:
        invoke = CliRunner().invoke
        return await asyncio.to_thread(invoke, app, list(arguments), stdin, environment | {"COLUMNS": "200"})

    return run


async def test_generate_streams_text(steersman: Any) -> None:
    result = await steersman("generate", "hello")
    assert (result.exit_code, result.stdout) == (0, "you said hello\n")
    chat = await steersman("generate", "-", "--system", "be brief", stdin="hi")
    assert chat.stdout == "you said system: be brief / user: hi\n"
    assert (await steersman("generate", "1 2", "--ids")).stdout == "4 5 \n"


async def test_generate_several_and_json(steersman: Any) -> None:
    several = await steersman("generate", "hello", "-n", "2")
    assert several.stdout.count("you said hello") == 2
    assert "sample 1: 2 tokens, ended by stop" in several.stdout
    rows = [json.loads(line) for line in (await steersman("generate", "x", "-n", "2", "--json")).stdout.splitlines()]
    assert [row["index"] for row in rows] == [0, 1]
    assert rows[0]["logprobs"] == [-0.5, -1.0]


async def test_status_shows_models_and_weights_and_fails_unless_all_serve(steersman: Any) -> None:
    policy = await steersman("status", "--json")
    rows = {row["service"]: row for row in json.loads(policy.stdout)}
    assert list(rows) == ["policy", "reference", "reward", "trainer"]
    assert {row["health"] for row in rows.values()} == {"SERVING"}
    assert (rows["policy"]["model"], rows["policy"]["weight_version"]) == ("tiny", "run@7")
    assert rows["reward"]["detail"] == "scorers: length (function)"
    assert rows["trainer"]["detail"] == "1 jobs running: my-job"
    assert policy.exit_code == 0
    table = await steersman("status", "--trainer", "127.0.0.1:1")
    assert "UNAVAILABLE" in table.stdout
    assert table.exit_code == 1


async def test_score_inline_and_from_a_file(steersman: Any, tmp_path: Path) -> None:
    inline = await steersman("score", "-p", "a", "-r", "bcd", "-r", "e")
    assert inline.exit_code == 0, inline.output
    assert [json.loads(line)["score"] for line in inline.stdout.splitlines()] == [3.0, 1.0]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"id": "x", "prompt": "a", "response": "bc"}, {"id": "y", "prompt": "a", "response": "too long"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = await steersman("score", "--input", str(source), "--output", str(target))
    assert result.exit_code == 1
    assert "1 items have no score" in result.stderr
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert (found[0]["id"], found[0]["score"]) == ("x", 2.0)
    assert found[1] == {"id": "y", "error": {"reason": "SEQUENCE_TOO_LONG", "message": "9 tokens, allowed: 8"}}


@pytest.mark.parametrize(
    ("text", "message", "code"),
    [
        ('{"prompt": "a", "response": "b"}\n{broken\n', "in.jsonl:2: is not JSON", 2),
        ('{"prompt": "a"}\n', "in.jsonl: row 1: has no 'response'; it has prompt", 2),
        ("[1]\n", "in.jsonl:1: is a list, allowed: an object", 2),
        ('{"prompt": "a", "response": [1]}\n', "in.jsonl: row 1 is 'str and list', allowed", 2),
    ],
)
async def test_a_bad_row_is_named_and_nothing_half_written(
    steersman: Any, tmp_path: Path, text: str, message: str, code: int
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(text)
    result = await steersman("score", "--input", str(source), "--output", str(target))
    assert result.exit_code == code
    assert message in result.stderr
    assert not target.exists()


async def test_logprobs(steersman: Any, tmp_path: Path) -> None:
    inline = await steersman("logprobs", "--ids", "1,2,3", "--entropy")
    assert json.loads(inline.stdout) == {"logprobs": [-0.25, -0.25], "entropies": [-0.25, -0.25]}
    source = tmp_path / "in.jsonl"
    source.write_text('{"token_ids": [1, 2]}\n{"token_ids": [1, 2, 3]}\n')
    result = await steersman("logprobs", "--input", str(source))
    assert [len(json.loads(line)["logprobs"]) for line in result.stdout.splitlines()] == [1, 2]


async def test_train_follows_to_the_end(steersman: Any, tmp_path: Path) -> None:
    config = tmp_path / "ppo.yaml"
    config.write_text("steps: 2\npolicy: {address: a:1}\n")
    result = await steersman("train", "ppo", str(config), "--set", "policy.wait=true", "--set", "lr=1e-3")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "step 1/2: waits for policy" in lines
    assert "step 1: objective/kl=0.125" in lines
    assert "my-job: succeeded" in lines
    assert lines[-1].endswith("runs/my-job")
    job = json.loads((await steersman("jobs", "get", "my-job")).stdout)
    assert job["config"] == {"steps": 2, "policy": {"address": "a:1", "wait": True}, "lr": 1e-3}


async def test_train_fails_with_the_job_and_with_bad_settings(steersman: Any, tmp_path: Path) -> None:
    config = tmp_path / "ppo.yaml"
    config.write_text("fail: true\n")
    failed = await steersman("train", "ppo", str(config))
    assert failed.exit_code == 1
    assert "error: job my-job is failed: out of memory" in failed.stderr
    config.write_text("stepz: 2\n")
    refused = await steersman("train", "ppo", str(config))
    assert refused.exit_code == 1
    assert refused.stderr.splitlines() == [
        "error: INVALID_FIELD: 2 bad settings",
        "  spec.config.stepz: no such setting",
        "  spec.config.lr: is -1, allowed: above 0",
    ]


async def test_train_may_only_submit_or_only_check(steersman: Any, tmp_path: Path) -> None:
    config = tmp_path / "ppo.yaml"
    config.write_text("")
    assert (await steersman("train", "ppo", str(config), "--no-follow")).stdout == "my-job\n"
    shown = await steersman("train", "ppo", str(config), "--dry-run", "--queue", "research", "--gpus", "1")
    assert shown.stdout == "kind: Job\nqueue: research\n"
    checked = await steersman("train", "ppo", str(config), "--validate-only")
    assert checked.stdout == ""
    assert "nothing was started" in checked.stderr


async def test_jobs(steersman: Any) -> None:
    listed = await steersman("jobs", "list")
    assert "my-job" in listed.stdout
    assert (await steersman("jobs", "cancel", "my-job")).stdout == "my-job is cancelling\n"
    assert "my-job: succeeded" in (await steersman("jobs", "watch", "my-job")).stdout
    assert (await steersman("jobs", "logs", "my-job", "--follow")).stdout == "step 1\nstep 2\ndone\n"
    assert (await steersman("jobs", "logs", "my-job", "--tail", "1")).stdout == "done\n"
    kept = await steersman("jobs", "delete", "my-job")
    assert "--on kubernetes" in kept.stderr
    resumed = await steersman("jobs", "resume", "my-job")
    assert resumed.exit_code == 1
    assert resumed.stderr.startswith("error: UNIMPLEMENTED")


async def test_no_service_is_one_clean_line_and_a_hint(steersman: Any) -> None:
    result = await steersman("jobs", "get", "my-job", "--address", "127.0.0.1:1")
    assert result.exit_code == 1
    first, hint = result.stderr.splitlines()
    assert first.startswith("error: UNAVAILABLE: 127.0.0.1:1: ")
    assert "steersman status" in hint
    assert "Traceback" not in result.output
