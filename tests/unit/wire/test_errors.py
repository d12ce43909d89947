"""The catalogue of errors is total, and errors survive the wire."""

import pytest
from google.protobuf.any_pb2 import Any

from steersman.v1 import status_pb2, types_pb2
from steersman.wire.errors import CODE_OF, Code, FieldViolation, Reason, SteersmanError, invalid_field
from steersman.wire.status import (
    REASON_PREFIX,
    decode_error,
    encode_details,
    reason_from_proto,
    reason_to_proto,
    status_from_proto,
    status_to_proto,
)


def test_the_catalogue_is_total() -> None:
    assert set(CODE_OF) == set(Reason)
    declared = {name.removeprefix(REASON_PREFIX) for name in types_pb2.ErrorReason.keys()}  # noqa: SIM118
    assert declared == {str(reason) for reason in Reason} | {"UNSPECIFIED"}


@pytest.mark.parametrize("reason", Reason)
def test_reasons_survive(reason: Reason) -> None:
    assert reason_from_proto(reason_to_proto(reason)) is reason
    error = status_from_proto(status_to_proto(SteersmanError(reason, "because")))
    assert error is not None
    assert (error.reason, error.code, error.message) == (reason, CODE_OF[reason], "because")


def test_details_survive() -> None:
    sent = SteersmanError(
        Reason.QUEUE_FULL,
        "full",
        violations=[FieldViolation(field="a.b", description="is 1, allowed: 2")],
        retry_after_seconds=0.25,
    )
    got = decode_error(int(sent.code), sent.message, encode_details(sent))
    assert (got.reason, got.code, got.message) == (sent.reason, sent.code, sent.message)
    assert (got.violations, got.retry_after_seconds) == (sent.violations, 0.25)


BROKEN_DETAIL = status_pb2.RpcStatus(
    details=[Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")]
).SerializeToString()


@pytest.mark.parametrize("details", [None, b"", b"\xff\xff\xff", BROKEN_DETAIL])
def test_peers_without_details(details: bytes | None) -> None:
    error = decode_error(int(Code.UNAVAILABLE), "connection refused", details)
    assert (error.reason, error.code, str(error)) == (None, Code.UNAVAILABLE, "UNAVAILABLE: connection refused")


def test_reasons_of_a_newer_peer_are_unknown() -> None:
    assert reason_from_proto(9999) is None
    assert reason_from_proto(0) is None


def test_an_ok_item_has_no_error() -> None:
    assert status_from_proto(status_to_proto(None)) is None


def test_long_values_are_shortened() -> None:
    error = invalid_field("prompt", "x" * 1000, "at most 10 characters")
    assert len(error.message) < 150
    assert error.message.startswith("prompt is 'xxx")


def test_errors_fit_into_a_trailer() -> None:
    huge = "\u4e2d" * 100_000
    violations = [FieldViolation(field=huge, description=huge)] * 3000
    error = SteersmanError(Reason.NOT_FOUND, f"no scorer is called {huge}", violations=violations)
    assert 3 * len(error.message.encode()) + len(encode_details(error)) < 8 * 1024


def test_control_characters_do_not_reach_logs_or_terminals() -> None:
    error = SteersmanError(
        Reason.INVALID_FIELD, "a\x1b[31m\0", violations=[FieldViolation(field="a\x1b", description="")]
    )
    assert (error.message, error.violations[0].field) == ("a?[31m?", "a?")
