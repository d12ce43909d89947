"""Limits that both ends know, so that a client can refuse or split before it sends."""

from typing import Final

MIB: Final = 1024 * 1024

# Room for a reference batch of 1,024 sequences of 4,096 tokens in both directions, far below protobuf's 2 GiB.
MAX_MESSAGE_BYTES: Final = 64 * MIB

# Weight chunks: smaller ones pay per-message costs, larger ones leave the CPU caches.
WEIGHT_CHUNK_BYTES: Final = 1 * MIB

# Routes of a relayed chunk stream. Protobuf reads messages within messages up to 100 deep.
MAX_RELAY_DEPTH: Final = 64
MAX_RELAY_FAN_OUT: Final = 16
MAX_RELAY_HOPS: Final = 1024

# Servers end connections that ping them more often. A bit less than this, for clocks that differ.
MIN_KEEPALIVE_SECONDS: Final = 5.0

# vLLM raises anything between 0 and the lower one to it, and log-probs would be of another distribution than asked.
MIN_TEMPERATURE: Final = 0.01
MAX_TEMPERATURE: Final = 100.0

MAX_SAMPLES_PER_PROMPT: Final = 256
MAX_STOP_STRINGS: Final = 16
MAX_STOP_TOKEN_IDS: Final = 64

# Items of one scoring or log-prob call. Larger lists are split by the client.
MAX_BATCH_ITEMS: Final = 1024


def is_temperature(value: float) -> bool:
    """Whether a softmax can be taken at this temperature. The bounds count, also as the float32 of a request."""
    return MIN_TEMPERATURE * (1 - 1e-6) <= value <= MAX_TEMPERATURE
