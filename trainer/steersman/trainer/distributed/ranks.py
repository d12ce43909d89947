"""The ranks that torchrun started.

Two ways to talk:

- *collectives* over the process group (gloo on CPUs, NCCL on GPUs), where all ranks compute the same thing at the
  same time. One that takes longer than `COLLECTIVE_SECONDS` fails on every rank;
- *commands* through torchrun's key-value store, where ranks wait for the lead. The lead may wait for a service for as
  long as the job allows, and meanwhile nobody waits in a collective.

A rank that dies takes its connections along, so that a collective under way fails on the others at once; torchrun
notices its end and stops them all. A rank that fails first leaves word why, for the lead to say. One that stands still
without dying is found by the `watch`.
"""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from steersman.trainer.distributed.shard import shard
from steersman.trainer.distributed.watch import FAILURE_KEY, Watch
from steersman.trainer.distributed.world import Command, Parts, Scope

COLLECTIVE_SECONDS: Final = 3600.0
"""Longest that a rank waits for the others in a collective. The watch finds one that stands still long before."""
_JOIN_SECONDS: Final = 600.0
# How often a rank that waits for a command looks up.
_HEAR_SECONDS: Final = 2.0
# Nearly every command is a collective, so nobody is further behind.
_KEPT_COMMANDS: Final = 1000
_STOP_KEY: Final = "steersman/stop"


class Ranks:
    """The `World` of torchrun's environment. Joined when it is made, which waits for all ranks; left by `close`.

    Args:
        on_standstill: given the error, records the end of the job when the watch found a rank that stands still. Called
            on one rank, from another thread, before the process ends.
    """

    rank: int
    size: int

    def __init__(self, on_standstill: Callable[[str], None] = lambda error: None) -> None:
        timeout = timedelta(seconds=COLLECTIVE_SECONDS)
        self._store, self.rank, self.size = next(iter(rendezvous("env://", timeout=timedelta(seconds=_JOIN_SECONDS))))
        self._num_commands = 0
        self._local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self._local_rank < self._num_devices:
            torch.cuda.set_device(self._local_rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self._num_devices else "gloo",
            store=PrefixStore("steersman/group", self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=timeout,
        )
        self._watch = Watch(self._store.clone(), rank=self.rank, size=self.size, on_verdict=on_standstill)
        self._marks = self._watch.marks

    @property
    def is_lead(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """Each rank has the CUDA device of its number on its machine, unless the job asks for the CPU."""
        if asked == "cpu" or (asked == "auto" and not self._num_devices):
            return "cpu"
        if asked not in ("auto", "cuda"):
            raise ValueError(
                f"device is {asked!r}, must be 'auto', 'cpu' or 'cuda' on several processes: each takes its own"
            )
        if self._local_rank >= self._num_devices:
            raise ValueError(
                f"device is {asked!r}, but this machine has {self._num_devices} CUDA devices, too few for its process "
                f"number {self._local_rank}: start at most one process a device, or use 'cpu'"
            )
        return f"cuda:{self._local_rank}"

    def shard(self, model: nn.Module, device_type: str, parts: Parts | None = None) -> Scope[Any]:
        """Shards `model` in place over all ranks, onto their devices ("cpu" or "cuda"); see `shard.shard`."""
        scope = shard(model, init_device_mesh(device_type, (self.size,)), parts)

        def passing(forward: Callable[[], Any]) -> Any:
            self._marks.begun()
            return scope(forward)

        return passing

    def local(self, tensor: Tensor) -> Tensor:
        """This rank's shard of `tensor`, sharing its memory; the tensor itself where it is whole."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def sum(self, *tensors: Tensor) -> None:
        """Adds up each tensor over the ranks, in place."""
        with self._marks.waiting():
            for tensor in tensors:
                dist.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """True if `flag` is on some rank."""
        count = torch.tensor([int(flag)])
        with self._marks.waiting():
            dist.all_reduce(count)
        return bool(count)

    def from_lead(self, data: bytes | None) -> bytes:
        """The lead's `data`, on every rank."""
        size = torch.tensor([len(data) if self.is_lead and data is not None else 0])
        with self._marks.waiting():
            dist.broadcast(size, src=0)
        buffer = np.empty(int(size), np.uint8)
        if self.is_lead and data is not None:
            buffer[:] = np.frombuffer(data, np.uint8)
        if len(buffer):
            with self._marks.waiting():
                dist.broadcast(torch.from_numpy(buffer), src=0)
        return buffer.tobytes()

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        self.any(False)

    def tell(self, name: str, **arguments: Any) -> None:
        """The lead has the others hear a command."""
        assert self.is_lead, "only the lead gives commands"
        self._store.set(_command_key(self._num_commands), json.dumps({"name": name, "arguments": arguments}))
        self._num_commands += 1
        if (old := self._num_commands - _KEPT_COMMANDS) >= 0:
            self._store.delete_key(_command_key(old))

    def hear(self, *, each_look: Callable[[], None] = lambda: None) -> Command:
        """The next command of the lead; waits for it without end, and calls `each_look` every few seconds meanwhile.
        RuntimeError if the store is gone, and with it torchrun.
        """
        key = _command_key(self._num_commands)
        each_look()  # commands may come faster than it looks up
        while not self._is_set(key):
            self._marks.mark()
            each_look()
        self._num_commands += 1
        command = json.loads(self._store.get(key))
        self._marks.note(f"{command['name']} {command['arguments']}")
        return Command(name=command["name"], arguments=command["arguments"])

    def watch(self, patience: float) -> None:
        """Finds from now on who stands still for longer than so many seconds; see `watch`."""
        self._watch.begin(patience)

    def note(self, doing: str) -> None:
        """This rank got on, and does something else now."""
        self._marks.note(doing)

    def long(self, doing: str) -> AbstractContextManager[None]:
        """What is done inside may take longer than the patience."""
        return self._marks.long(doing)

    def ask_to_stop(self) -> None:
        """Has the lead hear that this rank was told to stop."""
        self._store.set(_STOP_KEY, "1")

    def stop_asked(self) -> bool:
        """True once some rank asked to stop."""
        return bool(self._store.check([_STOP_KEY]))

    def blame(self, own_error: str) -> str:
        """Why the stage failed: the error of the rank that was first to say, this one or another.

        A collective that fails says only that a connection broke; the cause is with the rank that broke it, if it
        lived long enough.
        """
        own = f"rank {self.rank} of {self.size} failed: {own_error}"
        try:
            return str(self._store.compare_set(FAILURE_KEY, "", own), "utf-8")
        except RuntimeError:
            return own  # the store went with torchrun

    def close(self) -> None:
        """Leaves the process group, and the watch."""
        self._watch.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the group ends with the process: leaving it could wait for a rank that is lost, and there is
        # still to be recorded why.
        if error is None:
            self.close()

    def _is_set(self, key: str) -> bool:
        try:
            self._store.wait([key], timedelta(seconds=_HEAR_SECONDS))
        except dist.DistStoreError:
            return False
        return True


def _command_key(number: int) -> str:
    return f"steersman/command/{number}"
