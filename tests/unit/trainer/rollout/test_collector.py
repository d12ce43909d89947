"""Each sample exactly once, or dropped and counted, whatever fails."""

import asyncio

import pytest
import rollout_fakes as fakes
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.client.types import FinishReason
from steersman.trainer.retry import Backoff, GaveUp, Waits
from steersman.trainer.rollout.collector import Collector, CollectorSettings
from steersman.trainer.rollout.types import RolloutBatch, SamplingSettings, describe_drops
from steersman.wire.errors import Code, Reason, SteersmanError


def collector(policies=None, reward=None, reference=None, gate=None, *, num_samples=2, **options):
    waits = options.pop("waits", None) or Waits()
    ports = {policy.target: policy for policy in policies or [fakes.FakePolicy()]}
    return Collector(
        ports.__getitem__,
        reward or fakes.FakeReward(),
        reference or fakes.FakeReference(),
        gate or fakes.FakeGate(),
        settings=CollectorSettings(
            sampling=SamplingSettings(num_samples=num_samples),
            backoff=options.pop("backoff", Backoff()),
            **options,
        ),
        targets=ports,
        waits=waits,
        sleep=fakes.no_sleep,
    )


async def collect(made: Collector, count: int = 4, **request: int) -> RolloutBatch:
    try:
        return await asyncio.wait_for(made.collect(fakes.prompts(count), **request), 20)
    finally:
        await made.close()


def keys(batch: RolloutBatch) -> list[tuple[int, int]]:
    return [rollout.key for rollout in batch.rollouts]


def all_keys(count: int = 4, num_samples: int = 2) -> list[tuple[int, int]]:
    return [(index, slot) for index in range(count) for slot in range(num_samples)]


async def test_every_sample_comes_once_with_its_own_score_and_reference() -> None:
    reward = fakes.FakeReward()
    batch = await collect(collector(reward=reward))
    assert keys(batch) == all_keys()
    assert [rollout.score for rollout in batch.rollouts] == [0.0, 1.0, 10.0, 11.0, 20.0, 21.0, 30.0, 31.0]
    assert all(rollout.ref_logprobs.tolist() == [-2.0] * 3 for rollout in batch.rollouts)
    assert set(reward.num_scored.values()) == {1}
    assert (batch.drops, batch.num_resent) == ((), 0)


async def test_completions_are_scored_while_their_siblings_are_still_drawn() -> None:
    events: list[str] = []
    reward = fakes.FakeReward(events=events)
    reference = fakes.FakeReference(events=events)
    release = asyncio.Event()

    class SlowSecond(fakes.FakePolicy):
        async def samples(self, prompt, sampling):
            yield fakes.sample(0)
            await release.wait()
            yield fakes.sample(1)

    made = collector([SlowSecond()], reward, reference)
    task = asyncio.create_task(collect(made, count=1))
    async with asyncio.timeout(20):
        while len(events) < 2:  # both services answer for the first sample although the second has not ended
            await asyncio.sleep(0.001)
    assert sorted(events) == ["reference 0.0", "score 0.0"]
    release.set()
    assert keys(await task) == [(0, 0), (0, 1)]


async def test_a_stream_that_breaks_costs_only_what_had_not_ended() -> None:
    policy = fakes.FakePolicy(script=[lambda n: [fakes.sample(1), fakes.broken()]])
    batch = await collect(collector([policy], num_samples=3), count=1)
    assert keys(batch) == all_keys(1, 3)
    assert batch.num_resent == 2
    # The second request asks for the two that are missing, no more.
    assert [event for event in policy.events if "prompt" in event] == ["policy-0 prompt 0 x3", "policy-0 prompt 0 x2"]


async def test_prompts_of_a_dead_replica_go_to_another() -> None:
    dead, alive = fakes.FakePolicy("policy-0", dead=True), fakes.FakePolicy("policy-1")
    seen = {0: 0}

    def is_alive(replica: int) -> bool:
        seen[0] += replica == 0
        return replica == 1 or seen[0] == 1  # there when the batch begins, gone for good at the first prompt

    batch = await collect(collector([dead, alive], gate=fakes.FakeGate(alive=is_alive)), count=6)
    assert keys(batch) == all_keys(6)
    assert not [event for event in dead.events if "ended" in event]


async def test_a_replica_that_comes_back_is_made_current_before_it_gets_prompts() -> None:
    events: list[str] = []
    policy = fakes.FakePolicy(events=events, script=[lambda n: [fakes.broken()]])
    looks = iter([True, False, False, True])
    gate = fakes.FakeGate(alive=lambda _: next(looks), events=events)
    await collect(collector([policy], gate=gate, num_samples=1), count=1)
    assert events == [
        "policy-0 current",
        "policy-0 prompt 0 x1",
        "policy-0 current",
        "policy-0 prompt 0 x1",
        "policy-0 ended 0.0",
        "policy-0 closed",
    ]


async def test_samples_of_other_weights_are_drawn_again_after_a_repair() -> None:
    policy = fakes.FakePolicy(step=0)  # restarted unseen: serves step 0 where step 3 is wanted

    def repair(_: int) -> None:
        # The first look still finds the old life of the replica.
        if gate.events:
            policy.step = 3

    gate = fakes.FakeGate(repair=repair, newest=3)
    batch = await collect(collector([policy], gate=gate), count=2, oldest_step=3)
    assert keys(batch) == all_keys(2)
    assert {step for rollout in batch.rollouts for step in rollout.token_steps} == {3}
    assert (batch.num_resent, batch.num_stale) == (4, 4)


async def test_samples_that_the_engine_gave_up_are_drawn_again_and_at_last_dropped() -> None:
    aborted = fakes.sample(0, finish=FinishReason.ABORTED)
    recovering = fakes.FakePolicy(script=[lambda n: [aborted]])
    assert keys(await collect(collector([recovering], num_samples=1), count=1)) == [(0, 0)]
    hopeless = fakes.FakePolicy(script=[lambda n: [aborted]] * 3)
    batch = await collect(collector([hopeless], num_samples=1, draw_attempts=3), count=1)
    assert keys(batch) == []
    assert (batch.drops[0].service, batch.drops[0].reason) == ("policy", "no usable sample in 3 draws")


async def test_a_prompt_that_is_refused_is_dropped_and_not_sent_again() -> None:
    refusal = SteersmanError(Reason.SEQUENCE_TOO_LONG, "prompt has 9 tokens, allowed: 8")
    policy = fakes.FakePolicy(script=[lambda n: [refusal]])
    batch = await collect(collector([policy], max_in_flight=2), count=3)
    assert len(batch.rollouts) == 4
    assert [(drop.service, drop.reason) for drop in batch.drops] == [("policy at policy-0", str(refusal))] * 2
    assert len([event for event in policy.events if "prompt" in event]) == 3


async def test_an_item_error_is_retried_and_never_becomes_a_score() -> None:
    error = SteersmanError(Reason.SCORER_FAILED, "raised")
    reward = fakes.FakeReward(item_failures={(0, 0): [error] * 2, (1, 1): [error] * 3})
    batch = await collect(collector(reward=reward, item_attempts=3), count=2)
    assert keys(batch) == [(0, 0), (0, 1), (1, 0)]
    assert [rollout.score for rollout in batch.rollouts] == [0.0, 1.0, 10.0]
    [drop] = batch.drops
    assert (drop.key, drop.service, drop.cause) == ((1, 1), "reward at reward-0", "SCORER_FAILED")
    assert str(drop) == "sample 1.1, reward at reward-0: SCORER_FAILED: raised"


async def test_one_bad_sequence_does_not_spoil_the_call_that_it_travels_in() -> None:
    batch = await collect(collector(reference=fakes.FakeReference(poisoned={2})), count=4)
    assert keys(batch) == [key for key in all_keys(4) if key[0] != 2]
    assert {drop.key for drop in batch.drops} == {(2, 0), (2, 1)}


async def test_an_engine_that_fails_every_call_is_named_with_its_address_its_reason_and_the_first_failures() -> None:
    class Broken(fakes.FakeReference):
        async def logprobs(self, completions, temperature):
            raise SteersmanError(Reason.INTERNAL, "the engine failed")

    reward = fakes.FakeReward(item_failures={(0, 0): [SteersmanError(Reason.SCORER_FAILED, "raised")] * 3})
    batch = await collect(collector(reward=reward, reference=Broken()), count=3)
    assert len(batch.drops) == 6
    assert describe_drops(batch.drops, num_shown=2) == (
        "5 by reference at reference-0 (INTERNAL), 1 by reward at reward-0 (SCORER_FAILED); "
        "first: sample 0.0, reward at reward-0: SCORER_FAILED: raised; "
        "sample 0.1, reference at reference-0: INTERNAL: the engine failed"
    )


async def test_a_service_that_is_away_is_waited_for_and_named() -> None:
    said: list[str] = []
    waits = Waits()

    class Watched(fakes.FakeReference):
        async def logprobs(self, completions, temperature):
            said.append(waits.text())
            return await super().logprobs(completions, temperature)

    reference = Watched(call_failures=[fakes.broken() for _ in range(5)])
    batch = await collect(collector(reference=reference, waits=waits))
    assert keys(batch) == all_keys()
    assert said[0] == ""
    assert "waiting for reference at reference-0: 0 s" in said
    assert waits.text() == ""


async def test_patience_ends() -> None:
    now = [0.0]
    waits = Waits(clock=lambda: now.__setitem__(0, now[0] + 1.0) or now[0])
    reward = fakes.FakeReward(call_failures=[fakes.broken() for _ in range(1000)])
    with pytest.raises(GaveUp, match=r"reward at reward-0 stayed away .* Socket closed"):
        await collect(collector(reward=reward, waits=waits, backoff=Backoff(give_up_seconds=30.0)))


async def test_patience_with_the_policy_ends() -> None:
    now = [0.0]
    waits = Waits(clock=lambda: now.__setitem__(0, now[0] + 1.0) or now[0])
    gate = fakes.FakeGate(alive=lambda _: False)
    with pytest.raises(GaveUp, match="policy at policy-0 stayed away"):
        await collect(collector(gate=gate, waits=waits, backoff=Backoff(give_up_seconds=30.0)))


async def test_a_score_that_is_not_finite_is_dropped() -> None:
    class NaN(fakes.FakeReward):
        async def scores(self, completions):
            return [float("nan") for _ in completions]

    batch = await collect(collector(reward=NaN()), count=1)
    assert (len(batch.rollouts), len(batch.drops)) == (0, 2)


async def test_prompts_spread_by_least_in_flight() -> None:
    release = asyncio.Event()

    class Held(fakes.FakePolicy):
        async def samples(self, prompt, sampling):
            self.events.append("prompt")
            await release.wait()
            for index in range(sampling.num_samples):
                yield fakes.sample(index)

    replicas = [Held(f"policy-{number}") for number in range(3)]
    made = collector(replicas, max_in_flight=4)
    task = asyncio.create_task(collect(made, count=6))
    async with asyncio.timeout(20):
        while sum(len(replica.events) for replica in replicas) < 6:
            await asyncio.sleep(0.001)
    assert [len(replica.events) for replica in replicas] == [2, 2, 2]
    release.set()
    assert keys(await task) == all_keys(6)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_sample_is_lost_or_doubled_under_random_failures(data: st.DataObject) -> None:
    """Each call fails or not as drawn; at the end every key is in exactly one of rollouts and drops."""
    count, num_samples = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    codes = [Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.INTERNAL, Code.CANCELLED]

    def errors(limit: int) -> list[SteersmanError]:
        drawn = data.draw(st.lists(st.sampled_from(codes), max_size=limit))
        return [SteersmanError(None, "drawn", code=code) for code in drawn]

    def stream(n: int):
        before = data.draw(st.integers(0, n))
        ended = [
            fakes.sample(index, finish=data.draw(st.sampled_from([FinishReason.STOP, FinishReason.ABORTED])))
            for index in data.draw(st.permutations(range(n)))[:before]
        ]
        return [*ended, *errors(1)]

    policies = [fakes.FakePolicy(f"policy-{number}", script=[stream] * 4) for number in range(2)]
    reward = fakes.FakeReward(
        call_failures=errors(3),
        item_failures={
            (data.draw(st.integers(0, 4)), 0): [SteersmanError(Reason.SCORER_FAILED, "drawn")]
            * data.draw(st.integers(0, 4))
        },
    )
    reference = fakes.FakeReference(call_failures=errors(3), poisoned=data.draw(st.sets(st.integers(0, 4), max_size=1)))
    made = lambda: collector(policies, reward, reference, num_samples=num_samples, call_items=3)  # noqa: E731
    batch = asyncio.run(_collect_new(made, count))
    assert sorted([*keys(batch), *(drop.key for drop in batch.drops)]) == all_keys(count, num_samples)
    assert all(times == 1 for times in reward.num_scored.values())
    assert all(rollout.score == 10.0 * rollout.key[0] + rollout.key[1] for rollout in batch.rollouts)


async def _collect_new(make, count: int) -> RolloutBatch:
    return await collect(make(), count)
