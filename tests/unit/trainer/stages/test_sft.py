import pytest
import torch
from pydantic import ValidationError

from steersman.trainer.checkpoint.atomic import CheckpointError, verify
from steersman.trainer.checkpoint.models import load_actor, load_tokenizer
from steersman.trainer.checkpoint.source import ModelSource
from steersman.trainer.data.rows import BadRow
from steersman.trainer.data.settings import DataSettings
from steersman.trainer.stages.run import METRICS_FILE, Run, read_rows
from steersman.trainer.stages.settings import OptimizerConfig
from steersman.trainer.stages.sft import run_sft
from steersman.trainer.stages.sft_config import SftConfig


@pytest.fixture
def config(tiny_model, tiny_tokenizer, write_rows, words):
    lesson = "w3 w4 w5 w3 w4 w5 w3 w4"
    rows = [
        {"prompt": words(["w1", "w2"], 1, 6), "completion": lesson[: 3 * length - 1]}
        for length in range(1, 9)
        for _ in range(6)
    ]
    return SftConfig(
        model=tiny_model,
        tokenizer=tiny_tokenizer,
        data=DataSettings(files=(write_rows(rows),)),
        eval_share=0.25,
        max_prompt_tokens=8,
        max_response_tokens=8,
        batch_size=8,
        max_steps=8,
        optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=2),
        log_every_steps=2,
        device="cpu",
    )


def run_in(directory, config, **options):
    with Run(directory, run_id="test", **options) as run:
        return run_sft(config, run)


class Listener:
    def __init__(self):
        self.progress = []

    def on_metrics(self, step, metrics):
        pass

    def on_progress(self, step, total_steps, message):
        self.progress.append((step, total_steps))


def test_progress_knows_from_the_start_how_far_it_goes(config, tmp_path):
    listener = Listener()
    run_in(tmp_path / "run", config.model_copy(update={"max_steps": 2}), listener=listener)
    assert listener.progress[0] == (0, 2)
    assert listener.progress == sorted(listener.progress)


def weights(directory):
    return load_actor(ModelSource(path=str(directory / "model"))).state_dict()


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_leaves_a_model_that_loads(config, tmp_path):
    result = run_in(tmp_path / "run", config.model_copy(update={"max_steps": 80}))
    verify(result.model_directory)
    rows = read_rows(tmp_path / "run" / METRICS_FILE)
    assert [row["step"] for row in rows] == list(range(2, 81, 2))
    assert rows[0]["loss"] > 3.0
    # Only where the response ends cannot be known.
    assert rows[-1]["eval/loss"] < 0.8
    assert result.metrics["eval/accuracy"] > 0.7
    assert load_tokenizer(str(result.model_directory))("w3").input_ids == [9]
    assert not result.stopped


def test_micro_batches_change_nothing(config, tmp_path):
    for budget in (16, 10_000):
        run_in(tmp_path / str(budget), config.model_copy(update={"micro_batch_tokens": budget, "max_steps": 3}))
    small, large = weights(tmp_path / "16"), weights(tmp_path / "10000")
    for name in small:
        torch.testing.assert_close(small[name], large[name], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("stop_after", [3, 5])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(config, tmp_path, stop_after):
    run_in(tmp_path / "straight", config)
    asked = iter([False] * stop_after + [True])
    stopped = run_in(tmp_path / "resumed", config, stop_requested=lambda: next(asked))
    assert (stopped.stopped, stopped.num_steps, stopped.model_directory) == (True, stop_after, None)
    assert not (tmp_path / "resumed" / "model").exists()
    resumed = run_in(tmp_path / "resumed", config)
    assert resumed.num_steps == 8
    assert equal(weights(tmp_path / "straight"), weights(tmp_path / "resumed"))
    steps = [row["step"] for row in read_rows(tmp_path / "resumed" / METRICS_FILE)]
    assert steps == sorted(set(steps))


def test_a_run_that_died_goes_on_from_its_last_whole_checkpoint(config, tmp_path):
    config = config.model_copy(update={"save_every_steps": 2})
    run_in(tmp_path / "straight", config)

    def die():
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return False

    calls: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "died", config, stop_requested=die)
    newest = max((tmp_path / "died" / "checkpoints").iterdir())
    (newest / "state.safetensors").write_bytes(b"cut")
    run_in(tmp_path / "died", config)
    assert equal(weights(tmp_path / "straight"), weights(tmp_path / "died"))
    assert [row["step"] for row in read_rows(tmp_path / "died" / METRICS_FILE)] == [2, 4, 6, 8]


def test_a_run_that_ended_is_left_as_it_is(config, tmp_path):
    first = run_in(tmp_path / "run", config)
    before = (first.model_directory / "model.safetensors").stat().st_mtime_ns
    again = run_in(tmp_path / "run", config)
    assert (first.model_directory / "model.safetensors").stat().st_mtime_ns == before
    assert (again.num_steps, again.stopped) == (8, False)
    assert again.metrics["eval/loss"] == first.metrics["eval/loss"]


def test_bad_rows_that_were_skipped_are_counted_in_the_result(config, tmp_path, write_rows):
    file = write_rows(
        [{"prompt": "w1", "completion": "w3"}, {"prompt": "w1"}, {"prompt": "", "completion": "w3"}], "b.jsonl"
    )
    data = DataSettings(files=(file,), on_bad_row="skip")
    result = run_in(tmp_path / "run", config.model_copy(update={"data": data, "eval_share": 0.0, "max_steps": 1}))
    assert (result.metrics["data/num_records"], result.metrics["data/num_bad_rows"]) == (1, 2)


def test_sequences_must_fit_into_the_context(config, tmp_path):
    with pytest.raises(ValueError, match=r"max_prompt_tokens \+ max_response_tokens is 68, must be at most .* 64"):
        run_in(tmp_path / "run", config.model_copy(update={"max_prompt_tokens": 60}))


def test_a_checkpoint_of_another_order_is_refused(config, tmp_path):
    asked = iter([False, True])
    run_in(tmp_path / "run", config, stop_requested=lambda: next(asked))
    with pytest.raises(CheckpointError, match="the order of the data would differ"):
        run_in(tmp_path / "run", config.model_copy(update={"batch_size": 4}))


def test_the_loss_counts_the_response_alone_unless_asked(config, tmp_path, write_rows):
    rows = [{"prompt": "w1 w2 w1", "completion": "w3"}] * 4
    base = config.model_copy(
        update={"data": DataSettings(files=(write_rows(rows, "same.jsonl"),)), "eval_share": 0.0, "max_steps": 1}
    )
    losses = {}
    for train_on_prompt in (False, True):
        changed = base.model_copy(update={"train_on_prompt": train_on_prompt})
        losses[train_on_prompt] = run_in(tmp_path / str(train_on_prompt), changed).metrics["loss"]

    tokenizer = load_tokenizer(config.tokenizer)
    model = load_actor(config.model, seed=config.seed, tokenizer=tokenizer)
    ids = torch.tensor([[7, 8, 7, 9, 1]])
    with torch.no_grad():
        nll = -torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None]).squeeze(1)
    assert losses[False] == pytest.approx(float(nll[2:].mean()), rel=1e-4)
    assert losses[True] == pytest.approx(float(nll.mean()), rel=1e-4)


def test_bfloat16_matrix_products_leave_float32_weights(config, tmp_path):
    run_in(tmp_path / "run", config.model_copy(update={"dtype": "bfloat16", "max_steps": 2}))
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "run").values())


def test_bad_data_stops_the_stage_before_it_trains(config, tmp_path, write_rows):
    bad = config.model_copy(update={"data": DataSettings(files=(write_rows([{"prompt": "w1"}], "bad.jsonl"),))})
    with pytest.raises(BadRow, match=r"bad\.jsonl:1: holds no response"):
        run_in(tmp_path / "run", bad)


@pytest.mark.parametrize(
    "bad", [{"batch_size": 0}, {"learning_rat": 1}, {"tokenizer": None}, {"eval_data": {"files": ["a.jsonl"]}}]
)
def test_a_bad_setting_is_named(config, bad):
    with pytest.raises(ValidationError, match=next(iter(bad))):
        SftConfig.model_validate(config.model_dump() | bad)
