"""Weights that several ranks of a trainer hold in shards, published without gathering them.

How a trainer uses it, with torch.distributed initialised (any backend; what is exchanged goes over gloo groups of its
own):

    sharded = ShardedWeights(connect)                    # on every rank: a collective
    publisher = Publisher(connect, run_id=...)           # on rank 0, the lead, as ever
    ...
    image = sharded.capture(shards_of(model), version)   # on every rank: a collective; copies
    if image is not None:                                # on the lead
        report = await publisher.publish(image)          # the other ranks train on, or wait where they like
    ...
    sharded.close()                                      # on every rank, the publisher closed before

`capture` copies this rank's shards to the CPU, cut along the tiles of the digest (`shards`). Everything after that is
driven by the lead's publisher, at any time, while threads of the other ranks serve it: each rank hashes its tiles,
encodes its part (all elements, or what changed since its own part of the version before), and sends it over a gRPC
stream of its own to each replica, or to the first replica of a relay. begin, stage, activate, abort and their retries
are the lead's alone; quorums, late joiners, chains of deltas and relays are as for any image.

Invariants:

- an element is held, hashed and sent by one rank; the digest that a replica verifies is of the complete weights, and
  the same as if one process had pushed them;
- a push is complete only if every rank's stream is: where one breaks, the replica drops the push, the lead aborts it,
  and what served before serves on;
- a rank that dies ends the publication with `RankLost`; what was begun is aborted;
- other ranks hold an image and a delta for exactly as long as the lead does.
"""

import itertools
from collections.abc import Iterable

import torch.distributed as dist

from steersman.trainer.weights.crew import Crew, Hand
from steersman.trainer.weights.ports import Connect
from steersman.trainer.weights.post import post_group
from steersman.trainer.weights.servant import Servant
from steersman.trainer.weights.sharded_image import ShardedImage
from steersman.trainer.weights.shards import Shard, recut, shards_of
from steersman.trainer.weights.slices import WeightSlices
from steersman.wire.identity import WeightVersion

__all__ = ["Shard", "ShardedImage", "ShardedWeights", "shards_of"]


class ShardedWeights:
    """This rank's part in sharded publications. Made on every rank, which is a collective of the default process group;
    `close` it before that group is destroyed, and after the lead's publisher.

    Args:
        connect: makes the port of a target, on every rank: each sends to every replica, or with a relay to the first
            ones, and needs a way there, and credentials if they are asked for.
    """

    def __init__(self, connect: Connect) -> None:
        self._cutting, self._lines = post_group(), post_group()
        self._numbers = itertools.count()
        self._crew: Crew | None = None
        self._servant, self._hand = Servant(connect), None
        if dist.get_rank() == 0:
            self._crew = Crew(self._lines)
        else:
            self._hand = Hand(self._lines, self._servant.serve)

    def capture(self, shards: Iterable[Shard], version: WeightVersion) -> ShardedImage | None:
        """Copies what this rank holds. A collective: every rank gives its shards of the same tensors, and the same
        version. The image for `Publisher.publish` on the lead, None elsewhere.

        ValueError on every rank if their tensors or versions differ, or if an element is held by none or by two;
        RankLost if the lead is gone. Takes the memory of the shards once more, until the publisher drops the image.
        """
        if self._hand is not None:
            self._hand.require_lead()
        layout, held = recut(shards, version, self._cutting)
        number, slices = next(self._numbers), WeightSlices(version, held)
        if self._hand is not None:
            self._servant.images[number] = slices
        dist.barrier(group=self._cutting)  # else the lead could ask for what is not there yet
        return ShardedImage(self._crew, number, slices, layout) if self._crew is not None else None

    def close(self) -> None:
        """Ends what is under way. Not a collective, but it waits some seconds for the other side."""
        if self._crew is not None:
            self._crew.close()
        if self._hand is not None:
            self._hand.close(self._servant.close())
