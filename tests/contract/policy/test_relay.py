"""A chunk stream that replicas pass on to each other: real servers, real links, and what breaks them."""

import socket
from collections.abc import Sequence

import grpc
import pytest
from delta_fakes import DeltaSource, contract_digest, deltas, host_bytes, start, stepped
from relay_fleet import (
    NUM_CHUNKS,
    TIMEOUT_S,
    Fault,
    FlippedBit,
    Node,
    Stuck,
    digest_of,
    fleet,
    header,
    messages,
    weights,
)

from steersman.policy.weights.relay import RelayRules
from steersman.v1 import types_pb2, weights_pb2
from steersman.wire.errors import Code, Reason, SteersmanError
from steersman.wire.status import DETAILS_TRAILER, decode_error, status_from_proto

CONTENT = weights()
Response = weights_pb2.PushChunksResponse


async def send(first: Node, *behind: weights_pb2.RelayHop) -> Response:
    stream = [header(first, *behind), *messages(CONTENT)]
    response: Response = await first.stub.PushChunks(stream, timeout=TIMEOUT_S)
    return response


async def ask(first: Node, *behind: weights_pb2.RelayHop) -> Response:
    """Only the route, for one that is refused: a sender that is still sending may miss why."""
    response: Response = await first.stub.PushChunks([header(first, *behind)], timeout=TIMEOUT_S)
    return response


def outcomes(response: Response) -> dict[str, Reason | Code | None]:
    """Why each replica of the route failed, None for those that did not."""
    found: dict[str, Reason | Code | None] = {}
    for receipt in response.relayed:
        assert receipt.target not in found
        error = status_from_proto(receipt.status)
        found[receipt.target] = (error.reason or error.code) if error else None
        expected = (0, 0) if error else (len(CONTENT), NUM_CHUNKS)
        assert (receipt.received_bytes, receipt.num_chunks) == expected
    return found


async def serves(nodes: Sequence[Node], content: bytes = CONTENT) -> None:
    """Ends the pushes; the engine then holds what was sent."""
    for node in nodes:
        await node.finish(digest_of(content))
        assert node.engine.loaded == content


async def kept(nodes: Sequence[Node]) -> None:
    """Their pushes have ended, and the weights of start-up serve."""
    for node in nodes:
        await node.until_free()
        assert (node.store.active.version.step, node.store.staged) == (0, None)


async def cannot_stage(nodes: Sequence[Node]) -> None:
    """Whether or not the push is still known: nothing of it is ever served."""
    for node in nodes:
        request = weights_pb2.StageRequest(push_id=node.push_id, digest=digest_of(CONTENT))
        error = await refusal(node.stub.Stage(request, timeout=TIMEOUT_S))
        assert error.reason in (Reason.WEIGHTS_INCOMPLETE, Reason.WEIGHT_PUSH_NOT_ACTIVE)
        assert (node.store.active.version.step, node.store.staged) == (0, None)


async def refusal(call: object) -> SteersmanError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    trailers = dict(caught.value.trailing_metadata() or ())
    return decode_error(caught.value.code().value[0], caught.value.details() or "", trailers.get(DETAILS_TRAILER))


async def test_a_chain_of_four_gets_what_was_sent_once() -> None:
    async with fleet(4) as nodes:
        a, b, c, d = nodes
        response = await send(a, b.hop(c.hop(d.hop())))
        assert (response.received_bytes, response.num_chunks) == (len(CONTENT), NUM_CHUNKS)
        assert list(outcomes(response).items()) == [(b.target, None), (c.target, None), (d.target, None)]
        await serves(nodes)


async def test_the_next_replica_is_dialled_once_for_all_pushes_until_one_fails() -> None:
    async with fleet(2) as nodes:
        a, b = nodes
        channels = a.servicer._relay._channels
        used = []
        for step in (1, 2):
            for node in nodes if step > 1 else []:
                await node.begin(step)
            await send(a, b.hop())
            async with channels.lease(b.target) as channel:
                used.append(channel)
            for node in nodes:
                await node.finish(digest_of(CONTENT), step)
        assert used[0] is used[1]
        for node in nodes:
            await node.begin(3)
        b.servicer.fault = FlippedBit(count=2)
        await send(a, b.hop())
        assert len(channels) == 0


async def test_a_tree_too() -> None:
    async with fleet(7) as nodes:
        root, left, right, *leaves = nodes
        route = left.hop(leaves[0].hop(), leaves[1].hop()), right.hop(leaves[2].hop(), leaves[3].hop())
        response = await send(root, *route)
        order = [left, leaves[0], leaves[1], right, leaves[2], leaves[3]]
        assert list(outcomes(response)) == [node.target for node in order]
        assert set(outcomes(response).values()) == {None}
        await serves(nodes)


async def test_a_replica_that_stops_in_mid_stream_takes_only_those_behind_it_along() -> None:
    async with fleet(4, faults={2: Fault(count=30)}) as nodes:
        a, b, c, d = nodes
        call = a.stub.PushChunks(timeout=TIMEOUT_S)
        await call.write(header(a, b.hop(c.hop()), d.hop()))
        chunks = messages(CONTENT)
        for message in chunks[:40]:
            await call.write(message)
        await c.fault.received.wait()  # the stream flows through b
        await b.stop()
        for message in chunks[40:]:
            await call.write(message)
        await call.done_writing()
        found = outcomes(await call)
        assert found.pop(d.target) is None
        assert found[c.target] is Reason.ENGINE_UNAVAILABLE
        assert set(found) == {b.target, c.target}
        assert b.target in next(receipt.status.message for receipt in (await call).relayed)
        await serves([a, d])
        await cannot_stage([c])


async def test_a_stuck_replica_is_left_behind() -> None:
    async with fleet(3, faults={1: Stuck(count=20)}) as nodes:
        a, b, c = nodes
        response = await send(a, b.hop(), c.hop())
        assert outcomes(response) == {b.target: Reason.DEADLINE_EXCEEDED, c.target: None}
        await serves([a, c])
        await kept([b])
        value = a.metrics.registry.get_sample_value
        assert value("steersman_policy_weight_relay_links_lost_total") == 1
        # All to the one; to the other what its window and the queue before it hold.
        assert len(CONTENT) < (value("steersman_policy_weight_relayed_bytes_total") or 0) < 2 * len(CONTENT)


async def test_a_replica_that_is_stuck_at_the_end_is_left_behind_too() -> None:
    async with fleet(2, faults={1: Stuck(count=NUM_CHUNKS + 1)}) as (a, b):
        assert outcomes(await send(a, b.hop())) == {b.target: Reason.DEADLINE_EXCEEDED}
        await serves([a])
        await kept([b])


async def test_the_link_next_to_a_stuck_replica_is_the_one_that_is_cut() -> None:
    async with fleet(4, faults={3: Stuck(count=20)}) as nodes:
        a, b, c, d = nodes
        response = await send(a, b.hop(c.hop(d.hop())))
        assert outcomes(response) == {b.target: None, c.target: None, d.target: Reason.DEADLINE_EXCEEDED}
        await serves([a, b, c])
        await kept([d])


async def test_a_target_that_never_answers_is_left_behind() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # takes connections, and says nothing
        async with fleet(2) as (a, b):
            address, port = listener.getsockname()
            silent = weights_pb2.RelayHop(target=f"{address}:{port}", push_id="any")
            response = await send(a, silent, b.hop())
            assert outcomes(response) == {silent.target: Reason.DEADLINE_EXCEEDED, b.target: None}
            await serves([a, b])


async def test_a_target_where_nobody_listens_is_left_behind() -> None:
    async with fleet(3) as (a, b, c):
        await b.stop()
        response = await send(a, b.hop(), c.hop())
        assert outcomes(response) == {b.target: Code.UNAVAILABLE, c.target: None}
        await serves([a, c])


async def test_a_flipped_bit_is_caught_where_it_arrives() -> None:
    async with fleet(4, faults={1: FlippedBit(count=20)}) as nodes:
        a, b, c, d = nodes
        response = await send(a, b.hop(c.hop()), d.hop())
        assert outcomes(response) == {
            b.target: Reason.WEIGHT_CHUNK_INVALID,
            c.target: Reason.ENGINE_UNAVAILABLE,
            d.target: None,
        }
        assert "checksum" in response.relayed[0].status.message
        await serves([a, d])
        await cannot_stage([b, c])


async def test_a_sender_that_goes_takes_all_pushes_of_its_route_along() -> None:
    async with fleet(3, faults={2: Fault(count=10)}) as nodes:
        a, b, c = nodes
        call = a.stub.PushChunks(timeout=TIMEOUT_S)
        await call.write(header(a, b.hop(c.hop())))
        for message in messages(CONTENT)[:40]:
            await call.write(message)
        await c.fault.received.wait()
        call.cancel()
        await kept(nodes)


async def test_what_one_replica_refuses_is_not_passed_on_for_long() -> None:
    async with fleet(2) as (a, b):
        stream = [header(a, b.hop()), *messages(CONTENT)[:40]]
        stream[-1].chunk.checksum ^= 1
        error = await refusal(a.stub.PushChunks(stream, timeout=TIMEOUT_S))
        assert error.reason is Reason.WEIGHT_CHUNK_INVALID
        assert a.store.pushing is not None  # refused, not broken: the sender may try another stream
        await b.until_free()


@pytest.mark.parametrize("push_id", ["", "another"])
async def test_nobody_is_dialled_for_a_push_that_is_not_there(push_id: str) -> None:
    async with fleet(2) as (a, b):
        message = weights_pb2.PushChunksRequest(push_id=push_id, relay=[b.hop()])
        error = await refusal(a.stub.PushChunks([message], timeout=TIMEOUT_S))
        assert error.reason is Reason.WEIGHT_PUSH_NOT_ACTIVE
        assert not b.fault.received.is_set()


async def test_a_bad_route_is_refused_before_anybody_is_dialled_and_the_push_stays_open() -> None:
    async with fleet(2) as (a, b):
        error = await refusal(ask(a, b.hop(b.hop())))
        assert [violation.field for violation in error.violations] == ["relay[0].next[0].target"]
        assert not b.fault.received.is_set()
        await send(a)
        await serves([a])


async def test_a_route_that_comes_back_is_refused_where_it_does() -> None:
    async with fleet(2) as (a, b):
        itself = a.hop()
        itself.target = a.target.replace("127.0.0.1", "localhost")
        error = await refusal(ask(a, b.hop(itself)))
        assert [violation.field for violation in error.violations] == ["relay[0].next[0].push_id"]


async def test_a_route_stands_on_the_first_message() -> None:
    async with fleet(2) as (a, b):
        stream = [header(a), weights_pb2.PushChunksRequest(relay=[b.hop()])]
        error = await refusal(a.stub.PushChunks(stream, timeout=TIMEOUT_S))
        assert [violation.field for violation in error.violations] == ["relay"]


async def test_a_replica_that_does_not_relay_says_so() -> None:
    async with fleet(2, rules=RelayRules(enabled=False)) as (a, b):
        assert (await refusal(ask(a, b.hop()))).reason is Reason.PERMISSION_DENIED
        await send(a)
        await serves([a])


async def test_a_first_message_with_a_chunk_is_passed_on_without_what_is_meant_for_one() -> None:
    async with fleet(2) as (a, b):
        first, *rest = messages(CONTENT)
        first.push_id = a.push_id
        first.relay.append(b.hop())
        response = await a.stub.PushChunks([first, *rest], timeout=TIMEOUT_S)
        assert outcomes(response) == {b.target: None}
        await serves([a, b])


async def test_deltas_travel_the_same_way() -> None:
    base = start()
    new = stepped(base, 1)
    chunks = [
        weights_pb2.PushChunksRequest(
            chunk=weights_pb2.WeightChunk(
                tensor_index=chunk.tensor_index,
                element_offset=chunk.element_offset,
                num_elements=chunk.num_elements,
                encoding=chunk.encoding,  # type: ignore[arg-type]
                data=chunk.data,
                checksum=chunk.checksum,
            )
        )
        for chunk in deltas(base, new)
    ]
    async with fleet(3, source=DeltaSource()) as nodes:
        for node in nodes:
            await node.begin(base=types_pb2.WeightVersion())
        a, b, c = nodes
        response = await a.stub.PushChunks([header(a, b.hop(c.hop())), *chunks], timeout=TIMEOUT_S)
        assert [receipt.num_chunks for receipt in response.relayed] == [len(chunks)] * 2
        for node in nodes:
            await node.finish(contract_digest(new))
            assert node.engine.loaded == host_bytes(new)
