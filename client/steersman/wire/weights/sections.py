"""Sections of a delta: byte strings of known length, each compressed on its own, or stored where that is no longer.

Nothing that a section says is believed: its length is bounded by what the header allows before a byte is allocated,
so a few hostile bytes cannot unfold into gigabytes.
"""

import struct
import threading
from typing import Final

import zstandard

from steersman.wire.weights.errors import bad_chunk

ENTRY: Final = struct.Struct("<II")
"""One line of the section table: length in the clear, length as stored."""

# Sections hold independent symbols: almost all gain is entropy coding. Seven-byte matches over a small table leave the
# literals to Huffman instead of spending bits on chance repetitions; measured smaller and twice as fast as level 1 on
# step sizes, the same on gaps.
_PARAMETERS: Final = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    window_log=17,
    hash_log=8,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    write_checksum=0,
)
_MIN_COMPRESSED_BYTES: Final = 32
"""Below this a frame's own header eats the gain."""


class _Contexts(threading.local):
    """Compression state; not safe to share between threads, costly to make for each section."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def pack_sections(sections: list[bytes]) -> bytes:
    """The table of the sections, then their stored bytes."""
    table, stored = bytearray(), []
    for section in sections:
        data = _contexts.compressor.compress(section) if len(section) >= _MIN_COMPRESSED_BYTES else section
        if len(data) >= len(section):
            data = section
        table += ENTRY.pack(len(section), len(data))
        stored.append(data)
    return bytes(table) + b"".join(stored)


class Reader:
    """Walks through a payload. Every method raises WEIGHT_CHUNK_INVALID where the payload ends early."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = memoryview(data).cast("B")
        self._at = 0

    @property
    def remaining(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def take(self, num_bytes: int, what: str) -> memoryview:
        """The next bytes."""
        if num_bytes > self.remaining:
            raise bad_chunk(what, f"{self.remaining} bytes", f"{num_bytes}: the payload is truncated")
        self._at += num_bytes
        return self._data[self._at - num_bytes : self._at]

    def unpack(self, layout: struct.Struct, what: str) -> tuple[int, ...]:
        """The next numbers."""
        return layout.unpack(self.take(layout.size, what))

    def sections(self, bounds: dict[str, tuple[int, int]]) -> dict[str, bytes | memoryview]:
        """The next sections by name, in the clear. `bounds` gives the least and the largest length of each."""
        lengths: dict[str, tuple[int, int]] = {}
        for name, (low, high) in bounds.items():
            length, stored = self.unpack(ENTRY, name)
            if not low <= length <= high:
                raise bad_chunk(name, f"{length} bytes", f"{low} to {high}")
            lengths[name] = length, stored
        return {name: self._section(name, length, stored) for name, (length, stored) in lengths.items()}

    def _section(self, name: str, length: int, stored: int) -> bytes | memoryview:
        if stored > length:
            raise bad_chunk(name, f"stored in {stored} bytes", f"at most its length, {length}")
        data = self.take(stored, name)
        if stored == length:
            return data
        try:
            # The frame's own claim is what gets allocated, so it is compared first.
            if (claimed := zstandard.frame_content_size(data)) != length:
                raise bad_chunk(name, f"a frame of {claimed} bytes", f"{length}")
            unpacked = _contexts.decompressor.decompress(data, max_output_size=length, allow_extra_data=False)
        except zstandard.ZstdError:
            raise bad_chunk(name, f"{stored} bytes that do not decompress", "a zstd frame") from None
        if len(unpacked) != length:
            raise bad_chunk(name, f"{len(unpacked)} bytes after decompression", f"{length}")
        return unpacked

    def end(self) -> None:
        """Checks that nothing is left over."""
        if self.remaining:
            raise bad_chunk("data", f"{self.remaining} bytes after the last section", "none")
