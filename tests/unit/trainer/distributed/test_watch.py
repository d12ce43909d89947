from contextlib import suppress
from dataclasses import replace

from steersman.trainer.distributed.watch import LONG_SECONDS, START_SECONDS, Marks, Observer, Sign

PATIENCE = 120.0


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def sign(
    beat: int = 1,
    idle: float = 0.0,
    allowance: float = 0.0,
    doing: str = "step 3 of 9: updating",
    *,
    waits: bool = False,
) -> Sign:
    return Sign(beat=beat, node="node-7", idle=idle, allowance=allowance, doing=doing, waits=waits)


def hear_all(observer: Observer, now: float, *signs: Sign) -> None:
    for rank, one in enumerate(signs):
        observer.hear(rank, replace(one, beat=int(now)), now=now)


def test_a_rank_that_gives_no_sign_stands_still_whatever_its_phase():
    observer = Observer(2, patience=PATIENCE, now=0)
    for now in range(0, 200, 5):
        observer.hear(0, sign(now), now=now)
        observer.hear(1, sign(now if now < 50 else 45, allowance=LONG_SECONDS), now=now)
        found = observer.verdict(now)
        assert (found is not None) == (now > 45 + PATIENCE)
    assert found == (1, "no sign of it for 150 s")
    error = observer.describe(*found)
    assert error.startswith(
        "rank 1 of 2 on node node-7 stands still: no sign of it for 150 s. It last did: step 3 of 9"
    )
    assert "rank 0: step 3 of 9: updating" in error


def test_while_one_rank_gets_on_the_others_may_wait_for_it():
    observer = Observer(3, patience=PATIENCE, now=0)
    hear_all(observer, 10_000, sign(idle=9000), sign(idle=5.0, doing="generating"), sign(idle=9000))
    assert observer.verdict(10_000) is None


def test_a_phase_that_is_announced_as_long_may_be_long():
    observer = Observer(2, patience=PATIENCE, now=0)
    writing = sign(idle=PATIENCE + LONG_SECONDS - 1, allowance=LONG_SECONDS, doing="writing a checkpoint")
    hear_all(observer, 5000, sign(idle=700), writing)
    assert observer.verdict(5000) is None
    hear_all(observer, 5002, sign(idle=702), replace(writing, idle=writing.idle + 2))
    assert observer.verdict(5002) == (1, "it has not got on for 721 s, and no other rank has for 702 s")


def test_of_ranks_that_all_live_and_do_not_get_on_the_one_that_stopped_first_is_named():
    observer = Observer(3, patience=PATIENCE, now=0)
    hear_all(observer, 400, sign(idle=121), sign(idle=124, doing="evaluating"), sign(idle=122))
    found = observer.verdict(400)
    assert found is not None
    assert found[0] == 1
    assert "It last did: evaluating" in observer.describe(*found)
    # One that waits for the others in a collective may have come there first.
    hear_all(observer, 500, sign(idle=121), sign(idle=130, doing="evaluating", waits=True), sign(idle=122))
    found = observer.verdict(500)
    assert found is not None
    assert found[0] == 2
    assert "rank 1: evaluating (waits for others)" in observer.describe(*found)
    # In different ones all may wait.
    hear_all(observer, 600, sign(idle=121, waits=True), sign(idle=130, waits=True), sign(idle=122, waits=True))
    found = observer.verdict(600)
    assert found is not None
    assert found[0] == 1


def test_a_rank_of_which_nothing_was_heard_may_still_start():
    observer = Observer(2, patience=PATIENCE, now=0)
    observer.hear(0, sign(1, idle=500), now=0)
    for now in range(0, 1900, 100):
        observer.hear(0, sign(now, idle=500), now=now)
        assert observer.verdict(now) is None
    observer.hear(0, sign(2000), now=2000)
    assert observer.verdict(2000) == (1, "no sign of it for 2000 s")
    assert "on node unknown" in observer.describe(1, "x")


def test_an_observer_that_was_away_blames_nobody_for_it():
    observer = Observer(2, patience=PATIENCE, now=0)
    hear_all(observer, 5, sign(), sign())
    assert observer.verdict(1000) is not None
    observer.forgive(1000)
    assert observer.verdict(1000) is None


def test_marks_say_how_long_ago_a_rank_got_on_and_what_its_phase_may_take():
    clock = Clock()
    marks = Marks(clock)
    clock.now += 10
    assert marks.sign(1, "n") == Sign(beat=1, node="n", idle=10, allowance=START_SECONDS, doing="starting")
    marks.begun()  # a forward pass
    assert marks.sign(2, "n") == Sign(beat=2, node="n", idle=0, allowance=0, doing="starting")
    with marks.waiting():
        clock.now += 3
        assert marks.sign(2, "n") == Sign(beat=2, node="n", idle=3, allowance=0, doing="starting", waits=True)
    assert not marks.sign(2, "n").waits
    marks.note("step 1 of 2: updating")
    with suppress(OSError), marks.long("writing a checkpoint"):
        clock.now += 7
        assert marks.sign(3, "n") == Sign(
            beat=3, node="n", idle=7, allowance=LONG_SECONDS, doing="writing a checkpoint"
        )
        marks.begun()
        assert marks.sign(3, "n").allowance == LONG_SECONDS
        raise OSError("full")
    assert marks.sign(4, "n") == Sign(beat=4, node="n", idle=0, allowance=0, doing="step 1 of 2: updating")
