"""How long new weights take to every replica, by the constants of one hop and the routes that the publisher would take.

Chunks flow down the routes. Each machine has an event loop, which handles one chunk at a time, and a network card,
which sends one at a time, in the order of its links; both work at once. Buffers are unbounded and links lose nothing,
so what comes out is the time that no flow control could better:

    loop(c, v) = max(arrival(c, v), loop(c - 1, v)) + forward * children(v) + take
    card(c, w) = max(c forwarded to w, w's stream open, card of the chunk or link before) + chunk / bandwidth
    arrival(c, w) = card(c, w)

Streams open one after the other down a route, `hop_s` each. A recurrence x(k) = max(a(k), x(k - 1)) + s is a running
maximum of a(k) - k s, so all chunks of a machine are calculated at once. Every replica then verifies and activates.

On one machine that all share, as in the check against real processes, nothing is faster than the processor time of
everything over the number of cores. And with more processes than cores all of it takes longer, since a process finds
in the caches what others left there: with n processes on m cores, a chunk's process was the last one on its core in m
of n cases, so processor time grows by the factor

    1 + crowding * max(0, 1 - m / n)

which has no meaning where each replica is a machine of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steersman.trainer.weights.routes import Node

Times = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The constants of one hop. Seconds; those of a chunk are processor time of its event loop.

    Attributes:
        chunk_bytes: of data in one chunk.
        send_s: a chunk at the trainer, for each stream that leaves it.
        receive_s: a chunk at a replica: parsed, compared with its checksum, copied.
        forward_s: a chunk at a replica, for each replica that it is passed on to.
        hop_s: from the start of a stream at a replica to its start at the next, and the answer back.
        begin_s: of a publication, before chunks flow.
        verify_s_per_byte: the digest over the complete weights: at the trainer before the first chunk, at each replica
            after the last.
        activate_s: from staged to active.
        encode_s_per_byte: of dense weights, finding and coding what has changed, by one thread (the trainer has two).
        apply_s_per_byte: of dense weights, applying that.
        crowding: what caches and memory that all processes share cost at most, as a share of processor time, dense.
        delta_crowding: the same for deltas.
    """

    chunk_bytes: int
    send_s: float
    receive_s: float
    forward_s: float
    hop_s: float
    begin_s: float = 0.0
    verify_s_per_byte: float = 0.0
    activate_s: float = 0.0
    encode_s_per_byte: float = 0.0
    apply_s_per_byte: float = 0.0
    crowding: float = 0.0
    delta_crowding: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Load:
    """What travels to each replica: `wire_bytes` for `dense_bytes` of weights, as they are or as what has changed."""

    dense_bytes: int
    wire_bytes: int
    is_delta: bool = False


@dataclass(frozen=True, kw_only=True)
class Network:
    """`bytes_per_second` of each machine's card and direction. `shared_cores`: all are one machine with so many."""

    bytes_per_second: float = math.inf
    shared_cores: int | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Until the last replica serves the new weights; processor time of all machines while chunks flow; what leaves the
    trainer.
    """

    seconds: float
    cpu_seconds: float
    trainer_bytes: int


def predict(routes: Sequence[Node[int]], load: Load, costs: Costs, network: Network) -> Prediction:
    """Time of one publication along `routes`, all of which begin at the trainer at once."""
    num_replicas = sum(1 for route in routes for _ in route.walk())
    streamed, work = _flow(routes, load, costs, network), _work(routes, num_replicas, load, costs)
    verified = once = load.dense_bytes * costs.verify_s_per_byte
    if network.shared_cores is not None:
        crowding = costs.delta_crowding if load.is_delta else costs.crowding
        work *= 1 + crowding * crowded_share(num_replicas, network.shared_cores)
        streamed = max(streamed, work / network.shared_cores)
        verified *= max(1.0, num_replicas / network.shared_cores)
    seconds = costs.begin_s + once + streamed + verified + costs.activate_s
    return Prediction(seconds=seconds, cpu_seconds=work, trainer_bytes=load.wire_bytes * len(routes))


def crowded_share(num_replicas: int, num_cores: int) -> float:
    """How often a process, of those of the replicas and the trainer's, was not the last one on its core."""
    return max(0.0, 1 - num_cores / (num_replicas + 1))


def _flow(routes: Sequence[Node[int]], load: Load, costs: Costs, network: Network) -> float:
    """When the last replica has the last chunk, by the recurrences of the module."""
    num_chunks = _num_chunks(load, costs)
    encode_s = load.dense_bytes * costs.encode_s_per_byte if load.is_delta else 0.0
    encoded = np.arange(1, num_chunks + 1, dtype=np.float64) * (encode_s / num_chunks)
    wire_s = load.wire_bytes / num_chunks / network.bytes_per_second
    take_s = _take_s(load, costs)
    arrivals, _ = _pass_on(encoded, len(routes), costs.send_s, 0.0, wire_s, opened=costs.hop_s)
    waiting = [(route, arrival, costs.hop_s) for route, arrival in zip(routes, arrivals, strict=True)]
    last = 0.0
    while waiting:
        node, arrival, opened = waiting.pop()
        opened += costs.hop_s
        arrivals, ended = _pass_on(arrival, len(node.next), costs.forward_s, take_s, wire_s, opened=opened)
        waiting += [(behind, there, opened) for behind, there in zip(node.next, arrivals, strict=True)]
        last = max(last, ended)
    return last


def _pass_on(
    arrival: Times, num_links: int, forward_s: float, take_s: float, wire_s: float, *, opened: float
) -> tuple[list[Times], float]:
    """When each chunk arrives at each of the next machines, and when the last one is done with here."""
    ends = _served(arrival, num_links * forward_s + take_s)
    begins = ends - num_links * forward_s - take_s
    if not num_links:
        return [], float(ends[-1])
    forwarded = begins[:, None] + forward_s * np.arange(1, num_links + 1)
    sent = _served(np.maximum(forwarded, opened).ravel(), wire_s).reshape(forwarded.shape)
    return list(sent.T), float(ends[-1])


def _served(ready: Times, seconds: float) -> Times:
    """When each of a queue is done with that takes so long for one, and has each from `ready` on."""
    before = np.arange(len(ready)) * seconds
    ended: Times = np.maximum.accumulate(ready - before) + before + seconds
    return ended


def _num_chunks(load: Load, costs: Costs) -> int:
    return max(1, math.ceil(load.wire_bytes / costs.chunk_bytes))


def _take_s(load: Load, costs: Costs) -> float:
    """What one chunk costs the replica that takes it, passing on aside."""
    apply_s = load.dense_bytes * costs.apply_s_per_byte / _num_chunks(load, costs) if load.is_delta else 0.0
    return costs.receive_s + apply_s


def _work(routes: Sequence[Node[int]], num_replicas: int, load: Load, costs: Costs) -> float:
    """Processor time of everything, until the last chunk is in."""
    of_a_chunk = (
        len(routes) * costs.send_s
        + (num_replicas - len(routes)) * costs.forward_s
        + num_replicas * _take_s(load, costs)
    )
    encode_s = load.dense_bytes * costs.encode_s_per_byte if load.is_delta else 0.0
    return _num_chunks(load, costs) * of_a_chunk + encode_s
