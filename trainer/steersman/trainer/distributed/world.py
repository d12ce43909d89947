"""The processes that train together, as a stage sees them; and the trivial case of one.

*Ranks* are numbered from 0; rank 0 is the *lead*: it owns the run folder, records the job and talks to the services. A
*collective* is a call that every rank makes, in the same order; it returns when all have.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

if TYPE_CHECKING:
    # The worker asks who it is before it is sure that there is work for torch.
    from torch import Tensor, nn

T = TypeVar("T")

Scope = Callable[[Callable[[], T]], T]
"""Runs a forward pass in which the parameters of one model are whole, and gives what it gives."""


class Parts(Protocol):
    """Values of a model's tensors that every rank can read, a part at a time, such as those in files."""

    def __contains__(self, name: str) -> bool:
        """Whether it has values of the tensor of this name."""
        ...

    def rows(self, name: str, start: int, stop: int) -> "Tensor":
        """Rows `start` to `stop` of the tensor, on the CPU, in any type; of one without dimensions, all."""
        ...


@dataclass(frozen=True, kw_only=True)
class Command:
    """What the lead has the other ranks do. Arguments are JSON values."""

    name: str
    arguments: Mapping[str, Any]


class World(Protocol):
    """The ranks of a stage."""

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    @property
    def is_lead(self) -> bool:
        """True on rank 0."""
        ...

    def device(self, asked: str) -> str:
        """The device of this rank where the job asks for `asked` ("auto", "cpu", "cuda", "cuda:N")."""
        ...

    def shard(self, model: "nn.Module", device_type: str, parts: Parts | None = None) -> Scope[Any]:
        """Shards `model` in place over the ranks, onto their devices; gives the scope of its forward passes. What is
        on the meta device gets its values from `parts`.
        """
        ...

    def local(self, tensor: "Tensor") -> "Tensor":
        """This rank's shard of `tensor`, sharing its memory; the tensor itself where it is whole."""
        ...

    def sum(self, *tensors: "Tensor") -> None:
        """Adds up each tensor over the ranks, in place. A collective."""
        ...

    def any(self, flag: bool) -> bool:
        """True if `flag` is on some rank. A collective."""
        ...

    def from_lead(self, data: bytes | None) -> bytes:
        """The lead's `data`, on every rank; what others give is not looked at. A collective."""
        ...

    def barrier(self) -> None:
        """Returns when every rank has come here. A collective."""
        ...

    def tell(self, name: str, **arguments: Any) -> None:
        """The lead has the others hear a command. Does not wait for them."""
        ...

    def hear(self, *, each_look: Callable[[], None] = lambda: None) -> Command:
        """The lead's next command, on a rank that is not the lead; waits for it without end, and calls `each_look`
        every few seconds meanwhile.
        """
        ...

    def watch(self, patience: float) -> None:
        """From now on a rank that stands still for longer than so many seconds ends the job."""
        ...

    def note(self, doing: str) -> None:
        """This rank got on, and does something else now: for the error, should it stand still."""
        ...

    def long(self, doing: str) -> AbstractContextManager[None]:
        """What is done inside may take longer than the patience of the watch."""
        ...

    def ask_to_stop(self) -> None:
        """Has the lead hear that this rank was told to stop."""
        ...

    def stop_asked(self) -> bool:
        """True once some rank asked to stop."""
        ...

    def blame(self, own_error: str) -> str:
        """Why the stage failed, where this rank ends with `own_error`: that of the rank which failed first."""
        ...


class Solo:
    """A world of one process. Its collectives return at once."""

    rank: Final = 0
    size: Final = 1
    is_lead: Final = True

    def device(self, asked: str) -> str:
        """What was asked for."""
        return asked

    def shard(self, model: "nn.Module", device_type: str, parts: Parts | None = None) -> Scope[Any]:
        """Leaves the model as it is."""
        return direct

    def local(self, tensor: "Tensor") -> "Tensor":
        """The tensor itself."""
        return tensor

    def sum(self, *tensors: "Tensor") -> None:
        """Leaves the tensors as they are."""

    def any(self, flag: bool) -> bool:
        """The flag itself."""
        return flag

    def from_lead(self, data: bytes | None) -> bytes:
        """The data itself."""
        assert data is not None
        return data

    def barrier(self) -> None:
        """Returns."""

    def tell(self, name: str, **arguments: Any) -> None:
        """Nobody hears."""

    def hear(self, *, each_look: Callable[[], None] = lambda: None) -> Command:
        """Nobody speaks."""
        raise AssertionError("a single process is the lead")

    def watch(self, patience: float) -> None:
        """Nobody watches."""

    def note(self, doing: str) -> None:
        """Nobody watches."""

    def long(self, doing: str) -> AbstractContextManager[None]:
        """Nobody watches."""
        return nullcontext()

    def ask_to_stop(self) -> None:
        """Nobody hears."""

    def stop_asked(self) -> bool:
        """Nobody else asks."""
        return False

    def blame(self, own_error: str) -> str:
        """The error itself."""
        return own_error


SOLO: Final = Solo()


def direct(forward: Callable[[], T]) -> T:
    """The `Scope` of a model whose parameters are always whole."""
    return forward()


def launched_size(environment: Mapping[str, str] = os.environ) -> int:
    """How many ranks torchrun started; 1 if it did not start this process."""
    if "RANK" not in environment:
        return 1
    return int(environment.get("WORLD_SIZE", "1"))


def launched_rank(environment: Mapping[str, str] = os.environ) -> int:
    """The number of this process among those that torchrun started; 0 if it did not start it."""
    return int(environment["RANK"]) if launched_size(environment) > 1 else 0
