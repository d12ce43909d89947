"""The real torchrun: it takes the arguments of a node, and its exit status tells how the workers ended."""

import asyncio
import os
from pathlib import Path

import pytest
from test_nodes import two_free_ports

from steersman.trainer.jobs.node import WORKER, Place, torchrun_command

WORKER_PROGRAM = """
import os, sys
assert (os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]) == ("2", "1")
code = int(sys.argv[1].split(",")[int(os.environ["RANK"])])
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("workers", "nodes"),
    [("0,0", [0, 0]), ("143,143", [143, 143]), ("1,143", [1, 143])],
    ids=["well", "told", "failed"],
)
async def test_the_status_of_torchrun_tells_why_its_workers_ended(
    tmp_path: Path, workers: str, nodes: list[int]
) -> None:
    (tmp_path / "worker.py").write_text(WORKER_PROGRAM)
    port = two_free_ports()
    running = []
    for node in range(2):
        place = Place(node=node, num_nodes=2, num_processes=1, coordinator="127.0.0.1", port=port, grace=60.0)
        command = torchrun_command(place, workers)
        assert command[-3:-1] == list(WORKER)
        command[-3:-1] = [str(tmp_path / "worker.py")]
        running.append(await asyncio.create_subprocess_exec(*command, env=dict(os.environ) | {"OMP_NUM_THREADS": "1"}))
    try:
        async with asyncio.timeout(120):
            assert [await one.wait() for one in running] == nodes
    finally:
        for one in running:
            if one.returncode is None:
                one.kill()
                await one.wait()
