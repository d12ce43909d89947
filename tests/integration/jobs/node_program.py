"""A node of a job whose worker does what its test writes into a folder: `node_program.py NODES PORT FOLDER`.

The worker is this file again, with the round and the node: `node_program.py work ROUND-NODE FOLDER`. With
`node_program.py train PORT RUN_DIR` it is one of two nodes that train for real.
"""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

from steersman.trainer.jobs.meeting import Patience
from steersman.trainer.jobs.node import Node, Place, run_node, torchrun_command

# Longer than any test; so that nothing outlives a broken one for long.
DEADLINE_SECONDS = 120.0


def work(folder: Path, name: str) -> int:
    """Says that it began; ends with the status that the folder tells."""
    signal.signal(signal.SIGTERM, lambda *_: (folder / f"{name}.told").touch())
    (folder / f"{name}.began").touch()
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (folder / f"{name}.do").exists():
        if time.monotonic() > deadline:
            return 9
        time.sleep(0.01)
    (folder / f"{name}.ended").touch()
    return int((folder / f"{name}.do").read_text())


class Rounds(Node):
    """A node whose command tells its round."""

    def __init__(self, place: Place, patience: Patience, folder: str) -> None:
        super().__init__(place, (), patience)
        self._folder = folder

    async def _work(self, number: int | None) -> int:
        name = f"{number}-{self.place.node}"
        self._command = (sys.executable, __file__, "work", name, self._folder)
        return await super()._work(number)


def main() -> int:
    """A worker, or a node."""
    if sys.argv[1] == "work":
        return work(Path(sys.argv[3]), sys.argv[2])
    train = sys.argv[1] == "train"
    num_nodes, port, folder = 2 if train else int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    place = Place(
        node=int(os.environ["JOB_COMPLETION_INDEX"]),
        num_nodes=num_nodes,
        num_processes=1,
        coordinator="127.0.0.1",
        port=port,
        grace=60.0,
    )
    if train:
        patience = Patience(beat=1.0, silence=60.0, settle=90.0, stop=2.0, join=240.0)
        return asyncio.run(run_node(Node(place, torchrun_command(place, folder), patience), host="127.0.0.1"))
    patience = Patience(beat=1.0, silence=20.0, settle=3.0, stop=2.0, join=60.0)
    return asyncio.run(run_node(Rounds(place, patience, folder), host="127.0.0.1"))


if __name__ == "__main__":
    sys.exit(main())
