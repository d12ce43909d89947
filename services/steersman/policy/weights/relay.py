"""Passes a stream of chunks on to other replicas while this one receives it.

Invariants:

- a route is checked as a whole before the first of its targets is dialled;
- what a replica passes on is what it received, byte for byte: the checks of the receiver hold for the whole way;
- links hold at most the last few chunks, which they share, however many they are;
- a link can hold up the stream for a bounded time only, and its end, however it comes, does no harm to the stream;
- every replica of the route is answered for, once.

Who is on the route, and what happens to those that did not get everything, is the sender's business.
"""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, Final, Self

import grpc
import grpc.aio

from steersman.serving.security.peer import PeerCredentials
from steersman.v1 import weights_pb2
from steersman.wire.endings import Endings
from steersman.wire.errors import Reason, SteersmanError, invalid_field, unavailable
from steersman.wire.idle import IdlePool
from steersman.wire.limits import MAX_MESSAGE_BYTES, MAX_RELAY_DEPTH, MAX_RELAY_FAN_OUT, MAX_RELAY_HOPS
from steersman.wire.status import DETAILS_TRAILER, decode_error, status_to_proto
from steersman.wire.weights.messages import PUSH_CHUNKS, ChunkMessage

_LOG = logging.getLogger(__name__)

# Enough to ride out a pause of the receiver's event loop at 10 Gbit/s, small beside any model.
_QUEUED_CHUNKS: Final = 8
# The replica nearest to what stands still must give it up first, or whole branches would fall with one leaf. The
# deepest route adds ten seconds: with the default stall time that is still within the lease of the pushes that wait.
_PATIENCE_PER_LEVEL_S: Final = 0.15
# Longer than between the updates of most trainers; a connection costs some milliseconds, with TLS some more.
_IDLE_S: Final = 300.0
_TARGET: Final = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):([0-9]{1,5})")

Hops = Sequence[weights_pb2.RelayHop]
OpenChannel = Callable[[str], grpc.aio.Channel]
Channels = IdlePool[grpc.aio.Channel]


def channel_opener(credentials: PeerCredentials | None = None) -> OpenChannel:
    """Opens channels to `host:port`, in the clear without `credentials`. With them, ValueError for a lost file."""
    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # The proxy of an environment is for the way out, not for the neighbours.
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if credentials is not None and credentials.server_name is not None:
        options.append(("grpc.ssl_target_name_override", credentials.server_name))

    def open_channel(target: str) -> grpc.aio.Channel:
        address = f"dns:///{target}"  # with the scheme, so that no name is read as one ("unix:1" is a socket)
        if credentials is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, credentials.to_grpc(), options=options)

    return open_channel


@dataclass(frozen=True, kw_only=True)
class RelayRules:
    """What a replica passes on, and how patiently.

    Attributes:
        enabled: False refuses every route.
        targets: patterns of host:port, as of a shell, one of which each target on a route must match.
        stall_seconds: how long a link to a last replica may take no chunk; those before it get more, see the module.
    """

    enabled: bool = True
    targets: Sequence[str] = ("*",)
    stall_seconds: float = 10.0

    def check(self, hops: Hops, own_push_id: str) -> None:
        """Raises PERMISSION_DENIED, or INVALID_FIELD naming the hop, if the route may not or cannot be served."""
        if not self.enabled:
            raise SteersmanError(Reason.PERMISSION_DENIED, "this replica relays nothing; push to each replica directly")
        targets: set[str] = set()
        push_ids = {own_push_id}
        for path, depth, hop in _walk(hops):
            if depth > MAX_RELAY_DEPTH:
                raise invalid_field("relay", f"{depth} hops deep", f"at most {MAX_RELAY_DEPTH}")
            if len(targets) == MAX_RELAY_HOPS:
                raise invalid_field("relay", f"over {MAX_RELAY_HOPS} hops", f"at most {MAX_RELAY_HOPS}")
            self._check_target(f"{path}.target", hop.target)
            if hop.target in targets:
                raise invalid_field(f"{path}.target", hop.target, "each replica once")
            # A replica has several names, but a push has one: this is what finds a route that comes back.
            if not hop.push_id or hop.push_id in push_ids:
                raise invalid_field(f"{path}.push_id", hop.push_id, "the push of that replica, each once")
            targets.add(hop.target)
            push_ids.add(hop.push_id)

    def _check_target(self, path: str, target: str) -> None:
        found = _TARGET.fullmatch(target)
        if found is None or not 0 < int(found[1]) < 65536:
            raise invalid_field(path, target, "host:port with a port from 1 to 65535")
        if not any(fnmatchcase(target, pattern) for pattern in self.targets):
            raise SteersmanError(Reason.PERMISSION_DENIED, f"{path}: this replica does not relay to {target}")


class Relay:
    """Opens streams onward. `open_channel` is the one place where a replica dials another. A channel is kept from one
    push to the next, until nothing was sent for a while or something went wrong. `close` it.
    """

    def __init__(self, rules: RelayRules, open_channel: OpenChannel | None = None) -> None:
        self._rules = rules
        self._channels: Channels = IdlePool(
            open_channel or channel_opener(), lambda channel: channel.close(None), idle_seconds=_IDLE_S
        )

    def stream(self) -> "RelayStream":
        """For one stream of chunks, which is passed on to nobody until its route is known."""
        return RelayStream(self._rules, self._channels)

    async def close(self) -> None:
        """Closes the channels."""
        await self._channels.close()


class RelayStream:
    """The way onward of one stream of chunks. `num_bytes` have been passed on so far, over all links.

    async with relay.stream() as onward:
        onward.open(push_id, hops)        # once, before the first chunk
        await onward.forward(message)     # for each message with a chunk
        receipts = await onward.finish()
    """

    def __init__(self, rules: RelayRules, channels: Channels) -> None:
        self._rules = rules
        self._channels = channels
        self._links: list[_Link] = []
        self.num_bytes = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends links that are still open; the pushes behind them end with them."""
        for link in self._links:
            link.cancel()
        await asyncio.gather(*(link.closed() for link in self._links))

    def open(self, push_id: str, hops: Hops, *, timeout: float | None = None) -> None:
        """Dials the next replicas of a stream that fills `push_id` here; all of it must be over within `timeout`
        seconds. Raises as `RelayRules.check`, and then nothing is dialled.
        """
        self._rules.check(hops, push_id)
        for hop in hops:
            patience = self._rules.stall_seconds + _PATIENCE_PER_LEVEL_S * (_height(hop) - 1)
            self._links.append(_Link(hop, self._channels, patience_s=patience, timeout=timeout))

    async def forward(self, message: ChunkMessage) -> None:
        """Queues a chunk for every link that holds, waiting for room as long as each link may make it wait."""
        links = [link for link in self._links if link.is_open]
        data = message.onward if links else b""
        self.num_bytes += len(data) * len(links)
        for link in links:
            await link.put(data)

    @property
    def num_lost(self) -> int:
        """Links that were given up or broke."""
        return sum(link.is_lost for link in self._links)

    async def finish(self) -> list[weights_pb2.RelayReceipt]:
        """Waits until every replica of the route has all, or has been given up: a receipt for each hop."""
        receipts = await asyncio.gather(*(link.finish() for link in self._links))
        return [receipt for link in receipts for receipt in link]


class Patience:
    """How long a link may hold up its stream: `stall_s` at once, and in all no longer than that and as long as it did
    not hold it up. So a link that stands still costs `stall_s`, and a slow one at most doubles the time of a push.

    Times are in seconds, on one monotonic clock.
    """

    def __init__(self, stall_s: float, now: float) -> None:
        self.stall_s = stall_s
        self._began = now
        self._spent_s = 0.0

    def left(self, now: float) -> float:
        """How long it may be waited for from `now` on; not above `stall_s`."""
        free_s = now - self._began - self._spent_s
        return max(0.0, min(self.stall_s, self.stall_s + free_s - self._spent_s))

    def spend(self, seconds: float) -> None:
        """It was waited for."""
        self._spent_s += seconds


class _Link:
    """One stream to the next replica, written by a task of its own."""

    def __init__(
        self, hop: weights_pb2.RelayHop, channels: Channels, *, patience_s: float, timeout: float | None
    ) -> None:
        self._hop = hop
        self._channels = channels
        self._timeout = timeout
        self._patience = Patience(patience_s, time.monotonic())
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(_QUEUED_CHUNKS)
        self._error: SteersmanError | None = None
        self._response: weights_pb2.PushChunksResponse | None = None
        self._task = asyncio.create_task(self._run())

    @property
    def is_open(self) -> bool:
        """Whether there is use in another chunk."""
        return not self._task.done() and self._error is None

    @property
    def is_lost(self) -> bool:
        """Whether it ended otherwise than with an answer."""
        return self._error is not None

    async def put(self, data: bytes | None) -> None:
        """Queues a message, None for the end. Gives the link up if that takes too long."""
        if not self.is_open:
            return
        if not self._queue.full():
            self._queue.put_nowait(data)
            return
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._patience.left(started)):
                await self._queue.put(data)
        except TimeoutError:
            self._give_up()
        finally:
            self._patience.spend(time.monotonic() - started)

    async def finish(self) -> list[weights_pb2.RelayReceipt]:
        """Waits for the answer, and tells what became of the replica and of those behind it."""
        await self.put(None)
        await asyncio.wait([self._task], timeout=self._patience.stall_s)
        if not self._task.done():
            self._give_up()
        if self._response is None:
            return self._failed(self._error or unavailable(f"{self._hop.target}: the link ended"))
        return self._receipts(self._response)

    def cancel(self) -> None:
        """Ends the call, if it is under way."""
        self._task.cancel()

    async def closed(self) -> None:
        """Returns when nothing of the link is left."""
        await asyncio.wait([self._task])

    def _give_up(self) -> None:
        self._fail(
            SteersmanError(
                Reason.DEADLINE_EXCEEDED,
                f"{self._hop.target} held up the stream: for over {self._patience.stall_s:g} s at once, or for most of "
                "the time",
            )
        )
        self.cancel()

    def _fail(self, error: SteersmanError) -> None:
        if self._error is None:
            self._error = error
            _LOG.warning("relay link lost", extra={"target": self._hop.target, "why": str(error)})

    async def _run(self) -> None:
        try:
            async with self._channels.lease(self._hop.target) as channel:
                self._response = await self._send(channel)
        except grpc.RpcError as error:
            self._fail(_translated(error, self._hop.target))
        except asyncio.CancelledError:
            # As well what grpc.aio raises when the other side cancelled.
            self._fail(SteersmanError(Reason.CANCELLED, f"{self._hop.target}: the stream was cancelled"))
        except Exception:
            _LOG.exception("relay link failed", extra={"target": self._hop.target})
            self._fail(SteersmanError(Reason.INTERNAL, f"{self._hop.target}: the link failed"))
        finally:
            while not self._queue.empty():  # lets a waiting `put` through
                self._queue.get_nowait()

    async def _send(self, channel: grpc.aio.Channel) -> weights_pb2.PushChunksResponse:
        start: Any = channel.stream_unary(
            PUSH_CHUNKS,
            request_serializer=None,  # chunks go on as they came
            response_deserializer=weights_pb2.PushChunksResponse.FromString,
        )
        call = start(timeout=self._timeout)
        ends = Endings(call)
        header = weights_pb2.PushChunksRequest(push_id=self._hop.push_id, relay=self._hop.next)
        data: bytes | None = header.SerializeToString()
        try:
            while data is not None:
                try:
                    await call.write(data)
                except (asyncio.InvalidStateError, grpc.RpcError):
                    break  # the other side ended the call; awaiting it tells why
                data = await self._queue.get()
            else:
                with contextlib.suppress(asyncio.InvalidStateError):
                    await call.done_writing()
            with ends.told():
                response: weights_pb2.PushChunksResponse = await call
                return response
        finally:
            call.cancel()

    def _receipts(self, response: weights_pb2.PushChunksResponse) -> list[weights_pb2.RelayReceipt]:
        """Of the replica, and of those behind it as far as it answered for them."""
        own = weights_pb2.RelayReceipt(
            target=self._hop.target, received_bytes=response.received_bytes, num_chunks=response.num_chunks
        )
        told = {receipt.target: receipt for receipt in response.relayed}
        silent = SteersmanError(Reason.UNIMPLEMENTED, f"{self._hop.target} passed nothing on: it knows no relay")
        behind = (hop.target for _, _, hop in _walk(self._hop.next))
        return [own, *(told.get(target) or _receipt(target, silent) for target in behind)]

    def _failed(self, error: SteersmanError) -> list[weights_pb2.RelayReceipt]:
        cut_off = unavailable(f"cut off: {self._hop.target} is on the way, and failed")
        behind = (hop.target for _, _, hop in _walk(self._hop.next))
        return [_receipt(self._hop.target, error), *(_receipt(target, cut_off) for target in behind)]


def _walk(hops: Hops) -> Iterator[tuple[str, int, weights_pb2.RelayHop]]:
    """Path, depth from 1 and hop, a hop before those behind it; without recursion, whatever a caller sends."""
    stack = [(f"relay[{index}]", 1, hop) for index, hop in enumerate(hops)][::-1]
    if len(stack) > MAX_RELAY_FAN_OUT:
        raise invalid_field("relay", f"{len(stack)} hops side by side", f"at most {MAX_RELAY_FAN_OUT}")
    while stack:
        path, depth, hop = stack.pop()
        yield path, depth, hop
        if len(hop.next) > MAX_RELAY_FAN_OUT:
            raise invalid_field(f"{path}.next", f"{len(hop.next)} hops side by side", f"at most {MAX_RELAY_FAN_OUT}")
        stack.extend([(f"{path}.next[{index}]", depth + 1, each) for index, each in enumerate(hop.next)][::-1])


def _height(hop: weights_pb2.RelayHop) -> int:
    """Replicas on the longest way from here, this one included."""
    return max(depth for _, depth, _ in _walk([hop]))


def _receipt(target: str, error: SteersmanError) -> weights_pb2.RelayReceipt:
    return weights_pb2.RelayReceipt(target=target, status=status_to_proto(error))


def _translated(error: Any, target: str) -> SteersmanError:
    """The error behind a `grpc.RpcError`."""
    details = next((value for key, value in error.trailing_metadata() or () if key == DETAILS_TRAILER), None)
    found = decode_error(error.code().value[0], error.details() or "", details)
    return SteersmanError(found.reason, f"{target}: {found.message or found.code.name}", code=found.code)
