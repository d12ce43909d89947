"""`steersman up` as a person runs it, with the lightest real service."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from steersman.cli.supervisor import free_port
from steersman.client import HealthClient


@contextmanager
def up(config: Path) -> Iterator[subprocess.Popen[str]]:
    """The command as a process; killed at the end if it still runs."""
    command = [sys.executable, "-m", "steersman.cli.main", "up", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def write(tmp_path: Path, port: int, extra: str = "") -> Path:
    path = tmp_path / "up.yaml"
    runs = tmp_path / "runs"
    path.write_text(f"services: {{trainer: {{port: {port}, metrics_port: null, runs_directory: {runs}{extra}}}}}\n")
    return path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_services_come_up_are_shown_and_end_in_order(tmp_path: Path, number: signal.Signals) -> None:
    port = free_port()
    with up(write(tmp_path, port)) as process:
        with HealthClient(f"127.0.0.1:{port}") as health:
            health.wait_until_serving(timeout=60)
        assert process.stderr is not None
        assert process.stderr.readline().startswith(f"trainer is ready on 127.0.0.1:{port} after ")
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "trainer | " in output
        assert "stopped" in output
        assert errors.endswith("stopping\n")


def test_a_service_that_refuses_its_settings_is_named_with_what_it_said(tmp_path: Path) -> None:
    with up(write(tmp_path, free_port(), ", no_such_setting: 1")) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: trainer: exited with status 2 before it was ready" in errors
    assert "no_such_setting: no such setting" in errors
    assert "Traceback" not in errors


def test_a_service_that_dies_later_ends_the_command(tmp_path: Path) -> None:
    port = free_port()
    with up(write(tmp_path, port)) as process:
        assert process.stderr is not None
        assert "is ready" in process.stderr.readline()
        (child,) = psutil.Process(process.pid).children()
        child.kill()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: trainer was ended by SIGKILL; its last lines:" in errors
