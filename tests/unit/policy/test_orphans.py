"""Engine processes end with the service."""

import os
import select
import signal
import subprocess
import sys

PROGRAM = """
import os, sys, time
from steersman.policy.engine.orphans import forks_end_with_us

def child():
    pid = os.fork()
    if pid == 0:
        os.close(1)  # or the test would wait for the end of the pipe
        time.sleep(60)
        os._exit(0)
    return pid

with forks_end_with_us():
    inside = child()
outside = child()
print(inside, outside, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_forked_child_ends_when_its_parent_is_killed() -> None:
    killed = subprocess.run([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, timeout=30)
    assert killed.returncode == -9
    inside, outside = map(int, killed.stdout.split())
    try:
        _wait_until_gone(inside)
    finally:
        os.kill(outside, signal.SIGKILL)  # raises if it had ended, too


def _wait_until_gone(pid: int) -> None:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ready, _, _ = select.select([process], [], [], 30)
    finally:
        os.close(process)
    assert ready, "the child lives on"
