"""What leaves the trainer for a dense push to eight replicas that pass it on, and how long such pushes take.

Two fleets of eight processes on loopback:

- policy servers with vLLM and a small model, for the figure: publications along a chain and along a tree, against one
  to a single replica;
- the same servers without an engine and with larger weights, for the times: with two of them the constants of a hop are
  measured, with four what processes cost each other that share cores, and what the simulator then predicts for eight is
  compared with what eight take.

Bytes are those that the kernel counts for the trainer process's own TCP sockets (see `relay_sides.sent_bytes`).
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from benchmarks import toymodel
from benchmarks.context import Context, Measured
from benchmarks.relay_simulator import Costs, Load, Network, crowded_share, predict
from benchmarks.stack import CORES, Service, running, tail, thread_environment
from steersman.trainer.weights.routes import Topology, plan
from steersman.wire.limits import WEIGHT_CHUNK_BYTES
from steersman.wire.weights.chunks import DeltaOptions, Encoding, delta_chunks
from steersman.wire.weights.delta import apply_delta

NUM_REPLICAS: Final = 8
WEIGHTS_MIB: Final = 256
REPETITIONS: Final = 5
_WAVE: Final = 2
"""Engines that start at once: each needs a core for most of its start."""
_TIMEOUT_S: Final = 900.0
_TOPOLOGIES: Final = (Topology.DIRECT, Topology.CHAIN, Topology.TREE)

PREDICTED_REPLICAS: Final = (8, 32, 100, 316, 1000)
PREDICTED_GBIT_PER_S: Final = (10, 100)
PREDICTED_DENSE_BYTES: Final = 16 * 10**9
"""Eight billion weights in bfloat16."""

Series = dict[str, list[dict[str, Any]]]


def run(context: Context) -> Measured:
    """Measures `relay8_trainer_bytes_ratio`."""
    num_engines, num_servers = (2, 3) if context.quick else (NUM_REPLICAS, NUM_REPLICAS)
    size_mib, repetitions = (64, 1) if context.quick else (WEIGHTS_MIB, REPETITIONS)
    with _engines(context.directory, num_engines) as replicas:
        small = _trainer(context.directory, replicas, repetitions, calibrate=False)
    with _servers(context.directory, num_servers, size_mib) as replicas:
        large = _trainer(context.directory, replicas, repetitions, calibrate=True)
    ratios = {
        f"{fleet}, {topology}": _sent(series, topology) / _sent(series, "one")
        for fleet, series in (("vLLM", small), ("without engine", large))
        for topology in ("chain", "tree")
    }
    costs, constants = calibrate(large)
    costs = crowded(large, costs)
    constants |= {"crowding": round(costs.crowding, 3), "delta_crowding": round(costs.delta_crowding, 3)}
    return Measured(
        figures={"relay8_trainer_bytes_ratio": max(ratios.values())},
        detail={
            "ratios": {name: round(ratio, 5) for name, ratio in ratios.items()},
            "vllm": {"replicas": num_engines, "weights_bytes": small["weights"][0]["dense_bytes"]},
            "without_engine": {"replicas": num_servers, "weights_bytes": large["weights"][0]["dense_bytes"]},
            "direct_ratio": round(_sent(large, "direct") / _sent(large, "one"), 5),
            "constants": constants,
            "check": check(large, costs, num_servers),
            "predicted_seconds": table(costs, large),
        },
    )


def calibrate(series: Series) -> tuple[Costs, dict[str, float]]:
    """The constants of a hop, from pushes to one and to two replicas, and chunks along chains of every length."""
    dense_bytes = series["weights"][0]["dense_bytes"]
    num_chunks = dense_bytes / WEIGHT_CHUNK_BYTES
    one, two = series["one"], series["two"]
    send_s = median(row["stream_cpu_s"][0] for row in one) / num_chunks
    receive_s = median(row["stream_cpu_s"][1] for row in one) / num_chunks
    # Of two replicas the first receives and passes on, the second receives: under the same conditions.
    forward_s = max(0.0, median(row["stream_cpu_s"][1] - row["stream_cpu_s"][2] for row in two) / num_chunks)
    stage_s = median(row["stage_s"] for row in one)
    # What a publication takes beside the stream and the two digests.
    begin_s = max(0.0, median(row["seconds"] - row["stream_s"] - 2 * row["stage_s"] for row in one))
    encode, apply = _codec()
    costs = Costs(
        chunk_bytes=WEIGHT_CHUNK_BYTES,
        send_s=send_s,
        receive_s=receive_s,
        forward_s=forward_s,
        hop_s=hop_seconds(series["hops"]),
        begin_s=begin_s,
        verify_s_per_byte=stage_s / dense_bytes,
        encode_s_per_byte=encode,
        apply_s_per_byte=apply,
    )
    constants = {
        "send_ms_per_chunk": 1e3 * send_s,
        "receive_ms_per_chunk": 1e3 * receive_s,
        "forward_ms_per_chunk": 1e3 * forward_s,
        "hop_ms": 1e3 * costs.hop_s,
        "begin_ms": 1e3 * begin_s,
        "verify_gb_per_s": 1e-9 / costs.verify_s_per_byte,
        "encode_gb_per_s": 1e-9 / encode,
        "apply_gb_per_s": 1e-9 / apply,
    }
    return costs, {name: round(value, 4) for name, value in constants.items()}


def crowded(series: Series, costs: Costs) -> Costs:
    """The costs with what processes on shared cores cost each other, from a chain of half the fleet."""
    dense_bytes, shares = series["weights"][0]["dense_bytes"], []
    for is_delta in (False, True):
        rows = series["delta, half" if is_delta else "half"]
        num = len(rows[0]["stream_cpu_s"]) - 1
        load = _load(series, dense_bytes, is_delta=is_delta)
        routes = plan(range(num), [], Topology.CHAIN, fan_out=2, nbytes=load.wire_bytes)
        alone = predict(routes, load, costs, Network()).cpu_seconds
        excess = median(sum(row["stream_cpu_s"]) for row in rows) / alone - 1
        shares.append(max(0.0, excess / crowded_share(num, CORES)) if crowded_share(num, CORES) else 0.0)
    return replace(costs, crowding=shares[0], delta_crowding=shares[1])


def hop_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    """What each further replica of a chain adds to the time of one chunk: least squares over the best of each."""
    lengths = sorted({row["length"] for row in rows})
    best = [min(row["seconds"] for row in rows if row["length"] == length) for length in lengths]
    slope = float(np.polyfit(lengths, best, 1)[0]) if len(lengths) > 1 else best[0]
    return max(0.0, slope)


def check(series: Series, costs: Costs, num_replicas: int) -> dict[str, dict[str, float]]:
    """Predicted against measured, for a fleet on this one machine: elapsed seconds of a publication, and processor
    seconds of all sides while chunks flow, which other work on the machine leaves alone. Medians.
    """
    dense_bytes = series["weights"][0]["dense_bytes"]
    found = {}
    for is_delta in (False, True):
        load = _load(series, dense_bytes, is_delta=is_delta)
        for topology in _TOPOLOGIES:
            name = f"delta, {topology}" if is_delta else str(topology)
            routes = plan(range(num_replicas), [], topology, fan_out=2, nbytes=load.wire_bytes)
            predicted = predict(routes, load, costs, Network(shared_cores=CORES))
            pairs = {
                "s": (predicted.seconds, median(row["seconds"] for row in series[name])),
                "cpu_s": (predicted.cpu_seconds, median(sum(row["stream_cpu_s"]) for row in series[name])),
            }
            found[name] = {
                key: round(value, 4)
                for unit, (expected, measured) in pairs.items()
                for key, value in (
                    (f"predicted_{unit}", expected),
                    (f"measured_{unit}", measured),
                    (f"measured_over_predicted_{unit}", measured / expected),
                )
            }
    return found


def table(costs: Costs, series: Series) -> list[dict[str, Any]]:
    """Seconds from a publication to the last replica, each replica a machine of its own."""
    rows = []
    for is_delta in (False, True):
        load = _load(series, PREDICTED_DENSE_BYTES, is_delta=is_delta)
        for gbit in PREDICTED_GBIT_PER_S:
            network = Network(bytes_per_second=gbit * 1e9 / 8)
            for num in PREDICTED_REPLICAS:
                row: dict[str, Any] = {"load": "delta" if is_delta else "dense", "gbit_per_s": gbit, "replicas": num}
                for topology in _TOPOLOGIES:
                    routes = plan(range(num), [], topology, fan_out=2, nbytes=load.wire_bytes)
                    prediction = predict(routes, load, costs, network)
                    row[str(topology)] = round(prediction.seconds, 2)
                    row[f"{topology}_trainer_gb"] = round(prediction.trainer_bytes / 1e9, 1)
                rows.append(row)
    return rows


def _load(series: Series, dense_bytes: int, *, is_delta: bool) -> Load:
    share = 1.0
    if is_delta:
        share = median(row["pushed_bytes"] for row in series["delta, one"]) / series["weights"][0]["dense_bytes"]
    return Load(dense_bytes=dense_bytes, wire_bytes=round(share * dense_bytes), is_delta=is_delta)


def _codec() -> tuple[float, float]:
    """Seconds per dense byte of one thread: finding and coding what has changed, and applying it."""
    generator = np.random.default_rng(0)
    base = generator.integers(0, 2**16, 2**24, np.uint16)
    new = base + (generator.random(base.size) < 0.035).astype(np.uint16)
    started = time.thread_time()
    chunks = list(delta_chunks(base, new, options=DeltaOptions(max_chunk_bytes=WEIGHT_CHUNK_BYTES)))
    encode_s = time.thread_time() - started
    copy = base.copy()
    started = time.thread_time()
    for chunk in chunks:
        span = copy[chunk.element_offset : chunk.element_offset + chunk.num_elements]
        assert chunk.encoding is Encoding.SPARSE_DELTA
        apply_delta(chunk.data, span)
    apply_s = time.thread_time() - started
    assert np.array_equal(copy, new)
    return encode_s / base.nbytes, apply_s / base.nbytes


def _sent(series: Series, name: str) -> float:
    return float(median(row["sent_bytes"] for row in series[name]))


def _trainer(directory: Path, replicas: Mapping[str, int], repetitions: int, *, calibrate: bool) -> Series:
    log = directory / "trainer.log"
    arguments = [str(repetitions), "yes" if calibrate else "no", *(f"{one}={pid}" for one, pid in replicas.items())]
    command = [sys.executable, "-m", "benchmarks.relay_sides", *arguments]
    with log.open("wb") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"the trainer's side failed:\n{tail(log)}")
    series: Series = {}
    for line in done.stdout.splitlines():
        row = json.loads(line)
        series.setdefault(row["series"], []).append(row)
    return series


@contextmanager
def _engines(directory: Path, num_replicas: int) -> Iterator[dict[str, int]]:
    """Policy servers with vLLM: process ids by address."""
    model = directory / "model"
    toymodel.save(toymodel.build_policy(seed=0, mean_tokens=None, limit=16), model)
    settings = {"model": str(model), "max_model_len": 64, "max_num_seqs": 4, "kv_cache_mib": 16, "num_threads": 1}
    services = [
        Service(
            name=f"policy-{number}", program="policy", settings=settings, environment=thread_environment(num_threads=1)
        )
        for number in range(num_replicas)
    ]
    found: dict[str, int] = {}
    with ExitStack() as stack:
        for start in range(0, num_replicas, _WAVE):
            wave = stack.enter_context(running(services[start : start + _WAVE], directory / "engines"))
            found |= {address: wave.pids[name] for name, address in wave.addresses.items()}
        yield found


@contextmanager
def _servers(directory: Path, num_replicas: int, size_mib: int) -> Iterator[dict[str, int]]:
    """Policy servers without an engine: process ids by address."""
    command = [sys.executable, "-m", "benchmarks.push_sides", "replica", str(size_mib)]
    found: dict[str, int] = {}
    with ExitStack() as stack:
        for number in range(num_replicas):
            log = directory / f"replica-{number}.log"
            errors = stack.enter_context(log.open("wb"))
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors))
            stack.callback(process.kill)
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"a replica ended early:\n{tail(log)}")
            found[json.loads(line)["address"]] = process.pid
        yield found
