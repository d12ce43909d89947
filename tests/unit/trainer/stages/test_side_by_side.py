"""Two computations at once."""

import threading

import pytest
import torch

from steersman.trainer.stages.side_by_side import SideBySide


@pytest.fixture
def _four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_four_threads")
def test_both_run_at_once_on_half_of_the_threads_each() -> None:
    meeting = threading.Barrier(2, timeout=60)

    def meet() -> int:
        meeting.wait()
        return torch.get_num_threads()

    both = SideBySide(enabled=True)
    with both.halves():
        assert both.run(meet, meet) == (2, 2)
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("_four_threads")
def test_they_take_turns_where_that_is_not_wanted_or_outside_of_the_halves() -> None:
    def name() -> str:
        return threading.current_thread().name

    here = name()
    with (apart := SideBySide(enabled=False)).halves():
        assert apart.run(name, name) == (here, here)
        assert torch.get_num_threads() == 4
    assert SideBySide(enabled=True).run(name, name) == (here, here)


@pytest.mark.usefixtures("_four_threads")
def test_an_error_of_either_is_raised_when_both_have_ended() -> None:
    ended: list[str] = []

    def fail() -> None:
        raise ValueError("no")

    def end() -> None:
        ended.append("end")

    both = SideBySide(enabled=True)
    for pair in ((fail, end), (end, fail)):
        with both.halves(), pytest.raises(ValueError, match="no"):
            both.run(*pair)
    assert (ended, torch.get_num_threads()) == (["end", "end"], 4)
