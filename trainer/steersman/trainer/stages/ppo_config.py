"""The settings of a PPO job. Every key is checked before anything starts; unknown keys are refused."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from steersman.trainer.checkpoint.source import ModelSource
from steersman.trainer.data.settings import DataSettings, TranscriptTemplate
from steersman.trainer.discovery.address import parse_address
from steersman.trainer.stages.settings import (
    MAX_SEED,
    MAX_STEPS,
    RANK_PATIENCE_SECONDS,
    DTypeSetting,
    OptimizerConfig,
    PatienceSetting,
)

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _ppo_optimizer() -> OptimizerConfig:
    # Epsilon 1e-5 as in OpenAI's PPO (arXiv 2403.17031, "Adam's epsilon"); a short memory, because the target moves.
    return OptimizerConfig(learning_rate=1e-5, schedule="constant", beta2=0.95, epsilon=1e-5)


class CredentialSettings(_Settings):
    """How the job proves to the services who it is, and knows them: files, read when it starts. TLS in any case."""

    ca_file: str | None = Field(default=None, description="PEM of the authority to trust; none is the system's.")
    cert_file: str | None = Field(default=None, description="PEM of the job's own certificate, for mutual TLS.")
    key_file: str | None = Field(default=None, description="PEM of its key.")
    token_file: str | None = Field(default=None, description="File with a bearer token, and nothing else.")
    server_name: str | None = Field(
        default=None, description="Name in the servers' certificates, where it is not the one in their addresses."
    )

    @model_validator(mode="after")
    def _whole_identity(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together, allowed: both or neither")
        return self


class ServiceSettings(_Settings):
    """Where the services are, and how patiently they are used."""

    policies: tuple[str, ...] = Field(
        default=("127.0.0.1:50051",),
        min_length=1,
        description="Where the policy replicas are: host:port of one; dns:///NAME:PORT, one at each address of the "
        "name; k8s:///[NAMESPACE/]SERVICE[:PORT], one at each ready endpoint of the Kubernetes Service (PORT is the "
        "name or number that the pods listen on). Names and Services are followed while the job runs.",
    )
    reference: str = Field(
        default="127.0.0.1:50052",
        description="host:port, several as a:1,b:2, dns:///NAME:PORT or k8s:///[NAMESPACE/]SERVICE[:PORT]; balanced by "
        "call. Services are followed while the job runs; names are looked up again when a connection ends.",
    )
    reward: str = Field(default="127.0.0.1:50053", description="As reference.")
    scorer: str = Field(default="", description="Name of the scorer; empty is the reward server's default.")
    reward_input: Literal["tokens", "text"] = Field(
        default="tokens", description="tokens if the reward model shares the policy's tokenizer, else text."
    )
    truncate_prompt: bool = Field(
        default=False, description="Let the reward service shorten prompts that are too long for its model."
    )
    credentials: CredentialSettings | None = Field(
        default=None, description="For services that listen with TLS; none is in the clear."
    )
    push_encoding: Literal["auto", "dense", "delta", "compact"] = Field(
        default="auto",
        description="How new weights travel to a replica that serves a version of late: all of them (dense), what "
        "changed wherever that is smaller (delta), the same in a quarter fewer bytes at a third of the speed, for "
        "wide-area links (compact), or what changed where few elements have (auto). All but dense hold the version "
        "before in host memory until the difference is encoded.",
    )
    push_image: Literal["host", "device"] = Field(
        default="host",
        description="Where the copies of the weights lie that are pushed: in host memory, or on the device of the "
        "model, where changes are then found and packed; that takes its memory, twice the actor while they are. "
        "Several ranks keep theirs on the host.",
    )
    delta_history_mib: int = Field(
        default=256,
        ge=0,
        description="Host memory for the differences between late versions, never more than the weights themselves: a "
        "replica that stayed behind gets those that it missed, if they are smaller than all weights. 0 keeps the "
        "newest only.",
    )
    push_topology: Literal["direct", "chain", "tree", "auto"] = Field(
        default="auto",
        description="How new weights get to several replicas: from the trainer to each (direct), or once from the "
        "trainer and then from replica to replica, each passing them on to one (chain) or to push_fan_out "
        "others (tree) while it receives them. auto: direct to fewer than four, else a chain or a tree, "
        "whichever is sooner for so many bytes. What breaks on the way is routed round. Replicas must "
        "reach each other by the addresses that the trainer uses.",
    )
    push_fan_out: int = Field(
        default=2, ge=2, le=16, description="Replicas that each one of a tree passes weights on to."
    )
    activation: Literal["as_staged", "all_or_nothing"] = Field(
        default="as_staged",
        description="When a replica switches to new weights: as soon as it has them, or when a quorum has them, and "
        "then all at once. Without a quorum nobody switches, and the same weights are published again until "
        "give_up_seconds have passed.",
    )
    activation_quorum: float = Field(
        default=1.0, gt=0, le=1, description="Share of the replicas that all_or_nothing waits for."
    )
    stage_timeout_seconds: Positive = Field(
        default=600.0,
        description="How long a step waits for replicas to receive new weights. Slower ones get no prompts until they "
        "have them.",
    )
    max_in_flight: int = Field(default=256, ge=1, description="Samples under way at one policy replica.")
    call_items: int = Field(default=32, ge=1, le=1024, description="Completions in one call to reward or reference.")
    call_concurrency: int = Field(default=2, ge=1, description="Calls under way at reward, and at reference.")
    item_attempts: int = Field(default=3, ge=1, description="Tries of an item that failed by itself.")
    give_up_seconds: Positive = Field(default=1800.0, description="How long a service may stay away.")
    keepalive_seconds: float = Field(
        default=20.0,
        ge=5,
        description="A service that is silent for so long during a call is pinged, and counts as away when it does not "
        "answer within half of that.",
    )
    backoff_seconds: Positive = Field(default=0.25, description="First wait after a failure; doubles each time.")
    max_backoff_seconds: Positive = Field(default=5.0, description="Longest wait between two tries.")

    @field_validator("policies")
    @classmethod
    def _means_something(cls, policies: tuple[str, ...]) -> tuple[str, ...]:
        for address in policies:
            parse_address(address)
        return policies

    @field_validator("reference", "reward")
    @classmethod
    def _means_a_service(cls, target: str) -> str:
        if target.startswith("k8s:"):
            parse_address(target)
        return target


class SamplingConfig(_Settings):
    """How responses are drawn. Always from the whole distribution: no nucleus, no top-k."""

    max_tokens: int = Field(default=64, ge=1, description="Longest response, end-of-sequence included.")
    temperature: float = Field(
        default=1.0, ge=0.01, le=100, description="Of the softmax; all log-probs are taken at it."
    )
    samples_per_prompt: int = Field(default=1, ge=1, le=256)
    min_tokens: int = Field(default=0, ge=0, description="No end-of-sequence before so many tokens.")
    ignore_eos: bool = Field(default=False, description="Go on to max_tokens: responses of fixed length.")


class KlSettings(_Settings):
    """What keeps the policy near the reference."""

    coefficient: float = Field(default=0.05, ge=0)
    place: Literal["reward", "loss"] = Field(default="reward", description="In the token rewards or in the loss.")
    estimator: Literal["k1", "k2", "k3"] | None = Field(
        default=None, description="Default: k1 in the reward, k2 in the loss (where k1 has no gradient)."
    )
    target: Positive | None = Field(
        default=None, description="KL per sequence, in nats, to steer to; None keeps the coefficient fixed."
    )
    horizon: int = Field(default=10_000, ge=1, description="Samples in which the controller corrects.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError("estimator is k1, must be k2 or k3 in a loss: the expected gradient of k1 is zero")
        if self.target is not None and self.coefficient == 0:
            raise ValueError("coefficient is 0, must be above 0 when target is set: it is changed by factors")
        return self


class EvaluationSettings(_Settings):
    """Scores on held-out prompts while training."""

    prompts: DataSettings
    every_steps: int = Field(default=20, ge=1, description="Steps between evaluations; also at the last step.")
    num_prompts: int = Field(default=64, ge=1)


class PpoConfig(_Settings):
    """A PPO job.

    The batch of a step is `prompts_per_step * sampling.samples_per_prompt` samples. It is gone through
    `num_epochs` times, in `num_minibatches` optimizer steps each; each of these adds up gradients over
    micro-batches of at most `micro_batch_tokens` padded tokens, which changes nothing but memory and time.
    """

    kind: Literal["ppo"] = "ppo"
    actor: ModelSource
    critic: ModelSource | None = Field(
        default=None, description="Where the critic starts, best the reward model; None: the actor with a fresh head."
    )
    critic_scale: Literal["served", "raw"] = Field(
        default="served",
        description="Scale on which the critic starts where its checkpoint says how scores are normalised: that of the "
        "scores that the reward service gives, or of raw ones.",
    )
    tokenizer: str | None = Field(default=None, description="Directory or hub id; default: actor.path.")
    prompts: DataSettings
    transcript: TranscriptTemplate = TranscriptTemplate()
    max_prompt_tokens: int = Field(default=512, ge=1, description="Longer prompts lose their oldest tokens.")
    services: ServiceSettings = ServiceSettings()
    sampling: SamplingConfig = SamplingConfig()

    total_steps: int = Field(default=100, ge=1, le=MAX_STEPS, description="Batches to train on.")
    prompts_per_step: int = Field(default=64, ge=1)
    num_epochs: int = Field(default=1, ge=1, description="Passes over each batch.")
    num_minibatches: int = Field(default=1, ge=1, description="Optimizer steps in a pass.")
    micro_batch_tokens: int = Field(default=4096, ge=1, description="Tokens in one forward pass, with padding.")
    retained_tokens: int | None = Field(
        default=None,
        ge=0,
        description="Tokens whose activations may be alive at once when a batch is one optimizer step: so many "
        "need one forward pass instead of two. Default: 16,384 on a CPU, one micro-batch elsewhere.",
    )
    max_staleness: int = Field(
        default=1,
        ge=0,
        description="How many steps the weights that draw a token may be behind those that are trained on it. "
        "0: generation and update take turns. N: up to N batches to come are drawn during the updates, and importance "
        "weights correct each token.",
    )

    optimizer: OptimizerConfig = Field(default_factory=_ppo_optimizer, description="Of the actor.")
    critic_optimizer: OptimizerConfig = Field(default_factory=_ppo_optimizer)
    critic_warmup_steps: int = Field(default=0, ge=0, description="First steps, in which only the critic learns.")

    gamma: Share = 1.0
    lam: Share = 0.95
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: Positive | None = Field(default=None, description="Default: clip_low.")
    value_clip: Positive | None = 0.2
    entropy_coefficient: float = Field(default=0.0, ge=0)
    kl: KlSettings = KlSettings()
    missing_eos_penalty: float | None = Field(
        default=None, ge=0, description="Taken off the score of a response that was cut off."
    )
    missing_eos_mode: Literal["subtract", "replace"] = "subtract"
    score_clip: Positive | None = Field(default=None, description="Scores are held within [-score_clip, score_clip].")
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    importance_cap: Positive | None = Field(
        default=2.0, description="Truncated importance sampling; None measures the mismatch and corrects nothing."
    )
    exact_entropy: bool = Field(
        default=False, description="Also log policy/entropy_avg over the whole vocabulary; costs a few per cent."
    )

    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    device: str = Field(default="auto", description="auto, cpu or cuda[:N].")
    dtype: DTypeSetting = Field(
        default="auto", description="Of matrix products: bfloat16 on CUDA, else float32; weights stay float32."
    )
    num_threads: int | None = Field(default=None, ge=1, description="CPU threads; default: torch's choice.")
    fast_linear: bool = Field(
        default=True, description="On CPUs, float32 matrix products through oneDNN where torch offers it."
    )
    save_every_steps: int = Field(default=20, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(default=2, ge=1)
    rank_patience_seconds: PatienceSetting = RANK_PATIENCE_SECONDS
    samples_logged: int = Field(default=2, ge=0, description="Random samples of a step written to samples.jsonl.")
    max_dropped_share: Share = Field(
        default=0.5, description="The job fails when a larger share of a batch had to be dropped."
    )
    evaluation: EvaluationSettings | None = None

    @property
    def samples_per_step(self) -> int:
        """Samples in the batch of one step, if none is dropped."""
        return self.prompts_per_step * self.sampling.samples_per_prompt

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_minibatches > self.samples_per_step:
            raise ValueError(
                f"num_minibatches is {self.num_minibatches}, must be at most the "
                f"{self.samples_per_step} samples of a step"
            )
        if self.sampling.ignore_eos and self.missing_eos_penalty is not None:
            raise ValueError(
                "missing_eos_penalty must be left out when sampling.ignore_eos is set: no response ends itself"
            )
        if self.tokenizer is None and self.actor.path is None:
            raise ValueError("tokenizer is missing, must be given when actor has no path")
        return self
