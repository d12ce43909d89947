"""The supervisor with real, tiny processes."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from steersman.cli.supervisor import ServiceSpec, StartError, Supervisor, free_port

PROGRAM = Path(__file__).with_name("healthy_service.py")


def spec(name: str, mode: str = "serve", address: str | None = None) -> ServiceSpec:
    address = address or f"127.0.0.1:{free_port()}"
    return ServiceSpec(name=name, command=(sys.executable, str(PROGRAM), address, mode), address=address)


def is_alive(pid: int) -> bool:
    """True unless the process is gone or only waits to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def eventually(condition: Callable[[], bool]) -> bool:
    """Polls until the condition holds, at most 20 s."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if condition():
            return True
        threading.Event().wait(0.02)
    return False


def test_starts_all_and_stops_them_in_order() -> None:
    lines: list[tuple[str, str]] = []
    with Supervisor([spec("one"), spec("two")], on_line=lambda name, line: lines.append((name, line))) as supervisor:
        assert supervisor["one"].is_serving()
        assert supervisor["two"].is_serving()
        pids = [process.pid for process in supervisor.processes.values()]
    assert not any(is_alive(pid) for pid in pids)
    assert [process.exit_code for process in supervisor.processes.values()] == [0, 0]
    for name in ("one", "two"):
        assert [line for who, line in lines if who == name][-1] == "ended in order"


def test_a_service_that_dies_ends_the_others_and_is_named_with_its_last_lines() -> None:
    supervisor = Supervisor([spec("good"), spec("bad", "die")], start_timeout=30)
    with pytest.raises(StartError) as caught:
        supervisor.start()
    assert caught.value.name == "bad"
    assert "exited with status 3" in caught.value.reason
    assert caught.value.tail == ("model: is /nowhere, allowed: a folder",)
    assert not supervisor["good"].is_running


def test_a_service_that_is_never_ready_is_given_up() -> None:
    supervisor = Supervisor([spec("slow", "never")], start_timeout=1.5)
    with pytest.raises(StartError, match="slow: is not ready"):
        supervisor.start()
    assert not supervisor["slow"].is_running


def test_a_port_in_use_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        supervisor = Supervisor([spec("late", address=f"127.0.0.1:{port}")])
        with pytest.raises(StartError, match=f"late: port {port} on 127.0.0.1 is in use"):
            supervisor.start()


def test_a_service_that_ignores_sigterm_is_killed() -> None:
    supervisor = Supervisor([spec("stubborn", "stubborn")], grace_seconds=0.3)
    supervisor.start()
    supervisor.stop()
    assert supervisor["stubborn"].exit_code == -signal.SIGKILL


def test_helpers_that_a_service_leaves_behind_end_with_it() -> None:
    supervisor = Supervisor([spec("leaky", "leaky")])
    supervisor.start()
    helper = int(supervisor["leaky"].tail()[0].removeprefix("helper "))
    assert is_alive(helper)
    supervisor.stop()
    assert eventually(lambda: not is_alive(helper))


def test_wait_returns_the_service_that_ended_and_it_can_be_started_again() -> None:
    with Supervisor([spec("one"), spec("two")]) as supervisor:
        os.kill(supervisor["two"].pid, signal.SIGKILL)
        failed = supervisor.wait()
        assert failed is supervisor["two"]
        assert failed.exit_code == -signal.SIGKILL
        failed.start()
        failed.wait_ready(30)
        assert failed.is_serving()


def test_request_stop_ends_waiting() -> None:
    with Supervisor([spec("one")]) as supervisor:
        threading.Timer(0.1, supervisor.request_stop).start()
        assert supervisor.wait() is None


def test_no_process_outlives_a_killed_supervisor() -> None:
    command = [sys.executable, str(PROGRAM), f"127.0.0.1:{free_port()}", "parent"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_alive(child)
        parent.kill()
    assert eventually(lambda: not is_alive(child))


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match="different"):
        Supervisor([spec("same"), spec("same")])
