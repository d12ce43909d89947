"""Which replica passes chunks on to which: pure functions from lists to trees.

Every root is sent to from here, so the number of roots is how often the chunks leave this process. With `n` replicas, a
cargo of `S` bytes, links of `B` bytes per second that a replica's streams share, and `h` seconds until a chunk that
came in has gone out again, all replicas have all chunks after about

    direct    n * S / B                       this process sends n times
    chain     S / B + n * h                   every link carries the cargo once
    tree      k * S / B + log_k(n) * h        with k streams out of each replica

(compare the pipelined broadcasts in Sanders, Speck, Träff, "Two-tree algorithms for full bandwidth broadcast", Parallel
Computing 35, 2009). So a chain is best for what is large, a tree for what is small, and `AUTO` takes the sooner one.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Generic, TypeVar

from steersman.wire.limits import MAX_RELAY_DEPTH, MAX_RELAY_FAN_OUT, MAX_RELAY_HOPS

T = TypeVar("T")

# Assumed by AUTO, as nobody has measured the links: 10 Gbit/s; a chunk of 1 MiB is on such a link for 0.9 ms, and a
# busy event loop takes a few more to hand it on.
_BYTES_PER_SECOND: Final = 1.25e9
_HOP_SECONDS: Final = 0.005
_AUTO_MIN_REPLICAS: Final = 4
"""For fewer, what a relay saves is not worth that replicas must reach each other."""


class Topology(StrEnum):
    """How chunks get to several replicas that are to have the same."""

    DIRECT = "direct"
    """A stream from the trainer to each."""
    CHAIN = "chain"
    """Each passes them on to one other."""
    TREE = "tree"
    """Each passes them on to a few others."""
    AUTO = "auto"
    """Direct to fewer than four replicas; else a chain or a tree, whichever is sooner for so many bytes."""


@dataclass(kw_only=True, eq=False)
class Node(Generic[T]):
    """One replica on a route, and those that it passes chunks on to."""

    item: T
    next: "list[Node[T]]" = field(default_factory=list)

    @property
    def height(self) -> int:
        """Replicas on the longest way from here, this one included."""
        return 1 + max((node.height for node in self.next), default=0)

    def walk(self) -> "Iterator[Node[T]]":
        """This one, then those behind it."""
        yield self
        for node in self.next:
            yield from node.walk()


def plan(relays: Sequence[T], leaves: Sequence[T], topology: Topology, *, fan_out: int, nbytes: int) -> list[Node[T]]:
    """Routes that reach every item once; `leaves` pass nothing on, and are roots only if there is nobody else.

    Within the limits of the protocol for depth, width and number; a fleet beyond them gets several routes of about the
    same size. `nbytes` is what one replica gets, `fan_out` the children of a node of a tree.
    """
    num = len(relays) + len(leaves)
    chosen = choose(num, nbytes, fan_out=fan_out) if topology is Topology.AUTO else topology
    if chosen is Topology.DIRECT or not relays:
        return [Node(item=item) for item in (*relays, *leaves)]
    longest = MAX_RELAY_DEPTH if chosen is Topology.CHAIN else MAX_RELAY_HOPS
    num_routes = max(-(-len(relays) // longest), -(-num // MAX_RELAY_HOPS))
    roots: list[Node[T]] = []
    for part, ends in zip(_split(relays, num_routes), _split(leaves, num_routes), strict=True):
        if not part:
            roots += [Node(item=item) for item in ends]
            continue
        nodes = _chain(part) if chosen is Topology.CHAIN else _tree(part, fan_out)
        roots.append(nodes[0])
        roots += _hang(ends, nodes)
    return roots


def choose(num_replicas: int, nbytes: int, *, fan_out: int) -> Topology:
    """What AUTO means for so many replicas and bytes."""
    if num_replicas < _AUTO_MIN_REPLICAS:
        return Topology.DIRECT
    once = nbytes / _BYTES_PER_SECOND
    # Chains beyond the depth of the protocol leave from here side by side.
    num_chains = -(-num_replicas // MAX_RELAY_DEPTH)
    chain = num_chains * once + num_replicas / num_chains * _HOP_SECONDS
    tree = fan_out * once + math.log(num_replicas, max(2, fan_out)) * _HOP_SECONDS
    return Topology.CHAIN if chain <= tree else Topology.TREE


def _split(items: Sequence[T], num_parts: int) -> list[Sequence[T]]:
    """Parts whose sizes differ by one at most."""
    cuts = [len(items) * index // num_parts for index in range(num_parts + 1)]
    return [items[start:end] for start, end in itertools.pairwise(cuts)]


def _chain(items: Sequence[T]) -> list[Node[T]]:
    nodes = [Node(item=item) for item in items]
    for node, behind in itertools.pairwise(nodes):
        node.next.append(behind)
    return nodes


def _tree(items: Sequence[T], fan_out: int) -> list[Node[T]]:
    """Complete, filled level by level."""
    nodes = [Node(item=item) for item in items]
    for index, node in enumerate(nodes[1:]):
        nodes[index // fan_out].next.append(node)
    return nodes


def _hang(leaves: Iterable[T], nodes: Sequence[Node[T]]) -> list[Node[T]]:
    """Hangs leaves below the nodes, the last ones first, one each and around again. Returns those without a place."""
    waiting = [Node(item=item) for item in leaves]
    while waiting and (homes := [node for node in reversed(nodes) if len(node.next) < MAX_RELAY_FAN_OUT]):
        for home in homes[: len(waiting)]:
            home.next.append(waiting.pop(0))
    return waiting
