"""Starts torchrun and ends it whatever happens."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

# A rank starts in ten seconds on an idle core, and there are up to three to two busy ones.
SECONDS = 240


@asynccontextmanager
async def torchrun(num_ranks: int, log: Path, *program: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """torchrun with `program` (arguments of Python) on so many ranks; its output goes to `log`."""
    environment = dict(os.environ) | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60",
    }
    # A machine may not know its own name.
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *launcher,
            "--nproc-per-node",
            str(num_ranks),
            *program,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def ended(process: asyncio.subprocess.Process, seconds: float = SECONDS) -> int:
    """The exit status, once it has ended."""
    async with asyncio.timeout(seconds):
        return await process.wait()
