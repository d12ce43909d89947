"""The delta codec on real AdamW steps: bytes against the entropy and against sparse safetensors, speed of one thread.

Chunks are made and applied as they travel, at most 1 MiB each, tensor by tensor. Speeds are bytes of the dense bfloat16
weights over processor time of the one thread that works, so that other work on the machine is not counted; elapsed
time stands beside it in the detail. Every application is compared with the new weights bit by bit.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from benchmarks.context import Context, Measured
from benchmarks.delta_data import STEADY_STEPS, Entropy, Pair, adamw_steps, entropy_of
from steersman.wire.weights.chunks import DeltaOptions, EncodedChunk, Encoding, delta_chunks
from steersman.wire.weights.delta import Profile, apply_delta

LEARNING_RATES = (1e-6, 3e-6, 1e-5)
SPEED_AT = 3e-6
REPETITIONS = 7


def run(context: Context) -> Measured:
    """Measures `delta_bytes_vs_entropy`, `delta_vs_sparse_safetensors` and the two speeds."""
    torch.set_num_threads(1)
    steady = 3 if context.quick else STEADY_STEPS
    repetitions = 1 if context.quick else REPETITIONS
    detail: dict[str, dict[str, object]] = {}
    against_entropy, against_sparse = [], []
    speeds: dict[str, float] = {}
    for learning_rate in LEARNING_RATES:
        wanted = [1, steady] if learning_rate == SPEED_AT else [steady]
        for step, pairs in adamw_steps(learning_rate, steps=wanted, quick=context.quick).items():
            name = f"{learning_rate:g}" if step == steady else f"{learning_rate:g}, first step"
            entropy, sparse = entropy_of(pairs), _sparse_safetensors_bytes(pairs)
            rows = {profile: _measure(pairs, profile, repetitions) for profile in Profile}
            detail[name] = _facts(entropy, sparse) | {str(profile): row for profile, row in rows.items()}
            if step == steady:
                against_entropy.append(rows[Profile.FAST]["bytes"] / entropy.flat_bytes)
                against_sparse.append(sparse / rows[Profile.FAST]["bytes"])
                if learning_rate == SPEED_AT:
                    speeds = rows[Profile.FAST]
    return Measured(
        figures={
            "delta_bytes_vs_entropy": max(against_entropy),
            "delta_vs_sparse_safetensors": min(against_sparse),
            "delta_encode_gb_per_s": speeds["encode_gb_per_s"],
            "delta_apply_gb_per_s": speeds["apply_gb_per_s"],
        },
        detail=detail,
    )


def _facts(entropy: Entropy, sparse_bytes: int) -> dict[str, object]:
    changes = entropy.num_changes
    return {
        "num_elements": entropy.num_elements,
        "changed": changes / entropy.num_elements,
        "flat_entropy_bytes_per_change": entropy.flat_bytes / changes,
        "context_entropy_bytes_per_change": entropy.context_bytes / changes,
        "sparse_safetensors_bytes_per_change": sparse_bytes / changes,
    }


def _measure(pairs: Sequence[Pair], profile: Profile, repetitions: int) -> dict[str, float]:
    """Total bytes, and GB/s of dense weights, of processor time and elapsed."""
    options = DeltaOptions(profile=profile)
    dense = sum(pair.new.nbytes for pair in pairs)
    chunks: list[list[EncodedChunk]] = []
    copies = [pair.base.copy() for pair in pairs]

    def encode() -> None:
        chunks[:] = [list(delta_chunks(pair.base, pair.new, options=options)) for pair in pairs]

    def apply() -> None:
        for copy, parts in zip(copies, chunks, strict=True):
            for chunk in parts:
                span = copy[chunk.element_offset : chunk.element_offset + chunk.num_elements]
                if chunk.encoding is Encoding.DENSE:
                    span[:] = np.frombuffer(chunk.data, span.dtype)
                else:
                    apply_delta(chunk.data, span)

    encoded, applied = [], []
    for _ in range(repetitions):
        encoded.append(_timed(encode))
        for copy, pair in zip(copies, pairs, strict=True):
            copy[:] = pair.base
        applied.append(_timed(apply))
        assert all(np.array_equal(copy, pair.new) for copy, pair in zip(copies, pairs, strict=True))
    num_bytes = sum(len(chunk.data) for parts in chunks for chunk in parts)
    return {
        "bytes": num_bytes,
        "bytes_per_change": num_bytes / sum(int(np.count_nonzero(pair.base != pair.new)) for pair in pairs),
        "encode_gb_per_s": dense / median(cpu for cpu, _ in encoded) / 1e9,
        "encode_elapsed_gb_per_s": dense / median(wall for _, wall in encoded) / 1e9,
        "apply_gb_per_s": dense / median(cpu for cpu, _ in applied) / 1e9,
        "apply_elapsed_gb_per_s": dense / median(wall for _, wall in applied) / 1e9,
    }


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    """Processor time of this thread and elapsed time, seconds."""
    cpu, wall = time.thread_time(), time.perf_counter()
    work()
    return time.thread_time() - cpu, time.perf_counter() - wall


def _sparse_safetensors_bytes(pairs: Sequence[Pair]) -> int:
    """Size of the file that others send: for each tensor the int32 indices of what changed, and the new values."""
    arrays: dict[str, NDArray[Any]] = {}
    for pair in pairs:
        changed = np.flatnonzero(pair.base != pair.new)
        arrays[f"{pair.name}.indices"] = changed.astype(np.int32)
        arrays[f"{pair.name}.values"] = pair.new[changed]
    return len(save(arrays))
