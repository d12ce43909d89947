"""All benchmarks, with what their figures mean and must reach."""

from benchmarks.context import Benchmark
from benchmarks.figures import Target

BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark(
        name="logprobs",
        module="benchmarks.logprob_agreement",
        targets={
            "logprob_max_abs_diff_fp32": Target(
                what="largest difference between the log-probs of policy (vLLM), reference and trainer, same weights "
                "and tokens, float32, nats",
                at_most=1e-4,
            ),
        },
    ),
    Benchmark(
        name="scoring",
        module="benchmarks.scoring",
        targets={
            "score_grpc_vs_inprocess": Target(
                what="scores per second through the reward service over gRPC, against the same model called in "
                "process on the same batches",
                at_least=0.9,
            ),
        },
    ),
    Benchmark(
        name="reward",
        module="benchmarks.reward",
        targets={
            "score_vs_oracle": Target(
                what="scores per second over gRPC at saturation, log-normal lengths, against an in-process oracle with "
                "all items at hand that computes each shared prompt once (the better of two oracles)",
                at_least=0.95,
            ),
            "score_vs_vllm_classify": Target(
                what="scores per second over gRPC against vLLM's own HTTP /classify, prefix cache on, same load",
                at_least=1.2,
            ),
            "score_vs_single": Target(
                what="scores per second over gRPC against an HTTP server that scores one sample a request",
                at_least=3.0,
            ),
            "interactive_p99_ratio": Target(
                what="99th percentile of the latency of an interactive request under bulk load, against its idle "
                "latency plus one micro-batch",
                at_most=3.0,
            ),
            "grpc_cpu_share": Target(
                what="share of the reward server's processor time at saturation that is not the model's: gRPC, "
                "conversion, queueing",
                at_most=0.05,
            ),
        },
    ),
    Benchmark(
        name="delta",
        module="benchmarks.delta",
        targets={
            "delta_bytes_vs_entropy": Target(
                what="bytes of lossless weight deltas against the flat empirical entropy of positions and steps, "
                "AdamW, the worst of learning rates 1e-6, 3e-6 and 1e-5",
                at_most=1.1,
            ),
            "delta_vs_sparse_safetensors": Target(
                what="size of sparse safetensors (int32 index, bfloat16 value) against a delta, the worst of the three",
                at_least=5.0,
            ),
            "delta_encode_gb_per_s": Target(
                what="dense bfloat16 weights encoded per second of one core, learning rate 3e-6, GB/s",
                at_least=1.5,
            ),
            "delta_apply_gb_per_s": Target(
                what="dense bfloat16 weights to which a delta is applied per second of one core, 3e-6, GB/s",
                at_least=4.0,
            ),
        },
    ),
    Benchmark(
        name="push",
        module="benchmarks.push",
        targets={
            "dense_push_vs_raw_tcp": Target(
                what="speed of a dense push over gRPC on loopback, against a raw TCP socket pair that fills the same "
                "shared memory in the same run",
                at_least=0.4,
            ),
        },
    ),
    Benchmark(
        name="activation",
        module="benchmarks.activation",
        targets={
            "activation_pause_decode_steps": Target(
                what="worst pause of generation at a change of weights, in decode steps: CPU engine, 64 running "
                "requests, none of which is disturbed",
                at_most=10.0,
            ),
        },
    ),
    Benchmark(
        name="relay",
        module="benchmarks.relay",
        targets={
            "relay8_trainer_bytes_ratio": Target(
                what="bytes that leave the trainer for a dense push to 8 replicas that pass it on, against those for "
                "a push to one (TCP payload of its sockets; the worst of chain and tree, with and without vLLM)",
                at_most=1.3,
            ),
        },
    ),
    Benchmark(
        name="ppo",
        module="benchmarks.ppo",
        targets={
            "ppo_samples_per_s_vs_trl_fixed": Target(
                what="PPO samples per second against TRL's PPOTrainer, all responses of full length",
                at_least=1.5,
            ),
            "ppo_samples_per_s_vs_trl_natural": Target(
                what="PPO samples per second against TRL's PPOTrainer, responses end at EOS, after a quarter of "
                "the limit on average",
                at_least=3.0,
            ),
        },
    ),
)


def select(names: list[str]) -> list[Benchmark]:
    """The benchmarks of those names, all of them for no names. ValueError names one that does not exist."""
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    for name in names:
        if name not in known:
            raise ValueError(f"there is no benchmark {name!r}: choose from {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)] if names else list(BENCHMARKS)
