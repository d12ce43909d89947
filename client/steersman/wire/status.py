"""`SteersmanError` to and from the rich error trailer (google.rpc.Status in `grpc-status-details-bin`)."""

from datetime import timedelta
from typing import Final, cast

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError, Message

from steersman.v1 import status_pb2, types_pb2
from steersman.wire.errors import Code, FieldViolation, Reason, SteersmanError

DETAILS_TRAILER: Final = "grpc-status-details-bin"
ERROR_DOMAIN: Final = "steersman"
REASON_PREFIX: Final = "ERROR_REASON_"
_TYPE_PREFIX: Final = "type.googleapis.com/google.rpc."


def _pack(name: str, message: Message) -> Any:
    return Any(type_url=_TYPE_PREFIX + name, value=message.SerializeToString())


def encode_details(error: SteersmanError) -> bytes:
    """The serialised google.rpc.Status of an error: ErrorInfo, BadRequest and RetryInfo as far as they apply."""
    status = status_pb2.RpcStatus(code=int(error.code), message=error.message)
    if error.reason is not None:
        info = status_pb2.ErrorInfo(reason=str(error.reason), domain=ERROR_DOMAIN)
        status.details.append(_pack("ErrorInfo", info))
    if error.violations:
        bad = status_pb2.BadRequest()
        for violation in error.violations:
            bad.field_violations.add(field=violation.field, description=violation.description)
        status.details.append(_pack("BadRequest", bad))
    if error.retry_after_seconds is not None:
        retry = status_pb2.RetryInfo()
        retry.retry_delay.FromTimedelta(timedelta(seconds=error.retry_after_seconds))
        status.details.append(_pack("RetryInfo", retry))
    return status.SerializeToString()


def decode_error(code: int, message: str, details: bytes | None) -> SteersmanError:
    """The error that a peer sent. Details that are missing or cannot be read leave a plain code and message."""
    reason: Reason | None = None
    violations: list[FieldViolation] = []
    retry_after: float | None = None
    for value in _unpack(details):
        if isinstance(value, status_pb2.ErrorInfo):
            if value.domain == ERROR_DOMAIN and value.reason in Reason.__members__:
                reason = Reason(value.reason)
        elif isinstance(value, status_pb2.BadRequest):
            violations = [FieldViolation(field=v.field, description=v.description) for v in value.field_violations]
        else:
            retry_after = value.retry_delay.ToTimedelta().total_seconds()
    return SteersmanError(reason, message, code=Code(code), violations=violations, retry_after_seconds=retry_after)


_Detail = status_pb2.ErrorInfo | status_pb2.BadRequest | status_pb2.RetryInfo
_DETAILS: Final[dict[str, type[_Detail]]] = {
    _TYPE_PREFIX + "ErrorInfo": status_pb2.ErrorInfo,
    _TYPE_PREFIX + "BadRequest": status_pb2.BadRequest,
    _TYPE_PREFIX + "RetryInfo": status_pb2.RetryInfo,
}


def _unpack(trailer: bytes | None) -> list[_Detail]:
    """The known details of a trailer; none if any of it is malformed."""
    try:
        status = status_pb2.RpcStatus.FromString(trailer or b"")
        return [_DETAILS[d.type_url].FromString(d.value) for d in status.details if d.type_url in _DETAILS]
    except DecodeError:
        return []


def reason_to_proto(reason: Reason | None) -> types_pb2.ErrorReason:
    """The enum value of a reason; unspecified for None."""
    return cast(types_pb2.ErrorReason, types_pb2.ErrorReason.Value(REASON_PREFIX + (reason or "UNSPECIFIED")))


def reason_from_proto(value: int) -> Reason | None:
    """The reason of an enum value; None for unspecified and for values of a newer peer."""
    if value not in types_pb2.ErrorReason.values():
        return None
    name = types_pb2.ErrorReason.Name(cast(types_pb2.ErrorReason, value)).removeprefix(REASON_PREFIX)
    return Reason(name) if name in Reason.__members__ else None


def status_to_proto(error: SteersmanError | None) -> types_pb2.ItemStatus:
    """The status of one item of a batch: OK for None."""
    if error is None:
        return types_pb2.ItemStatus(code=int(Code.OK))
    return types_pb2.ItemStatus(code=int(error.code), reason=reason_to_proto(error.reason), message=error.message)


def status_from_proto(status: types_pb2.ItemStatus) -> SteersmanError | None:
    """The error of one item of a batch, None if it is OK."""
    if status.code == Code.OK:
        return None
    return SteersmanError(reason_from_proto(status.reason), status.message, code=Code(status.code))
