"""Who computes with how many threads when calls share them."""

import threading

import pytest
import torch

from steersman.serving.threads import ThreadShares, default_calls, set_own_threads


def on_new_thread(work):
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


@pytest.fixture(autouse=True)
def _four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_a_thread_sets_its_own_number_and_nobody_elses():
    def change() -> int:
        set_own_threads(1)
        return torch.get_num_threads()

    assert on_new_thread(change) == 1
    assert torch.get_num_threads() == 4
    assert on_new_thread(torch.get_num_threads) == 4


def test_a_lone_call_gets_all_threads_if_it_may():
    shares = ThreadShares(4, 2)

    def see(may_take_all: bool) -> int:
        with shares.take(may_take_all=may_take_all):
            return torch.get_num_threads()

    assert on_new_thread(lambda: see(True)) == 4
    assert on_new_thread(lambda: see(False)) == 2

    def beside_another() -> int:
        with shares.take(may_take_all=False):
            return on_new_thread(lambda: see(True))

    assert on_new_thread(beside_another) == 2
    assert on_new_thread(lambda: see(True)) == 4


def test_one_call_at_a_time_leaves_the_number_alone():
    with ThreadShares(2, 1).take(may_take_all=False):
        assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    ("device", "num_threads", "calls"), [("cpu", 1, 1), ("cpu", 2, 2), ("cpu", 64, 4), ("cuda", 64, 1)]
)
def test_how_many_calls_run_side_by_side_by_default(device, num_threads, calls):
    assert default_calls(device, num_threads) == calls
