"""The error of a delta or a chunk that cannot be read."""

from steersman.wire.errors import Reason, SteersmanError, invalid_field


def bad_chunk(field: str, value: object, allowed: str) -> SteersmanError:
    """WEIGHT_CHUNK_INVALID, naming the field of the chunk, its value and what is allowed."""
    return invalid_field(f"chunk.{field}", value, allowed, reason=Reason.WEIGHT_CHUNK_INVALID)
