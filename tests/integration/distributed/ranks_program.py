"""Two ranks that talk in every way, and then one fails. What the lead saw goes to the file FOLDER/lead.json."""

import json
import sys
import time
from pathlib import Path

import torch

from steersman.trainer.distributed.ranks import Ranks

PATIENCE_SECONDS = 120


def main(folder: Path) -> int:
    with Ranks() as world:
        seen: dict[str, object] = {"rank": world.rank, "size": world.size, "device": world.device("auto")}
        tensor = torch.arange(3.0) + world.rank
        world.sum(tensor)
        seen["sum"] = tensor.tolist()
        seen["any"] = [world.any(world.rank == 1), world.any(False)]
        sent = world.from_lead(bytes(range(256)) * 999 if world.is_lead else b"not looked at")
        seen["sent"] = sent == bytes(range(256)) * 999
        seen["empty"] = world.from_lead(b"" if world.is_lead else None) == b""
        if not world.is_lead:
            heard = [world.hear(), world.hear(each_look=world.ask_to_stop)]
            assert [(command.name, dict(command.arguments)) for command in heard] == [("one", {"x": 1}), ("two", {})]
            world.blame("ValueError: the disk is full")
            return 1
        world.tell("one", x=1)
        # The other one asks to stop while it waits for the second command.
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not world.stop_asked() and time.monotonic() < deadline:
            time.sleep(0.05)
        seen["stop_asked"] = world.stop_asked()
        world.tell("two")
        try:
            world.barrier()
        except RuntimeError as error:
            seen["error"] = world.blame(f"{type(error).__name__}: {error}")
    (folder / "lead.json").write_text(json.dumps(seen))
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
