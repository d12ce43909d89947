"""Settings of a batcher."""

from typing import Final

from pydantic import BaseModel, ConfigDict, Field

# Measured on a CPU with models of 3 and 27 million parameters: the time per token is the same from 400 to 6,000
# tokens a batch, and a quarter to a third longer at 12,000, where the activations no longer fit in the caches.
CPU_BATCH_TOKENS: Final = 4096
ACCELERATOR_BATCH_TOKENS: Final = 16384

# However slow a model is: smaller batches would cost more time a token.
MIN_BATCH_TOKENS: Final = 256


class BatchingSettings(BaseModel):
    """How items of several callers are put together."""

    model_config = ConfigDict(extra="forbid")

    max_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Padded tokens of one batch. Default: 4096 on a CPU, divided by the batches that run side by side; "
        "16384 on an accelerator.",
    )
    max_batch_ms: float | None = Field(
        default=None,
        gt=0,
        description="Time that one batch, and so an interactive item's wait, should take at most: a batch holds fewer "
        "tokens where the model has turned out to be too slow. Default: no such bound.",
    )
    max_batch_items: int = Field(default=256, ge=1, description="Items of one batch.")
    max_queue_items: int = Field(default=8192, ge=1, description="Waiting items; more are refused (QUEUE_FULL).")
    max_delay_ms: float = Field(
        default=2.0,
        ge=0,
        le=1000,
        description="How long an idle worker waits for another caller, and anew when one joins, ten times at most.",
    )
    batch_overhead_tokens: int = Field(
        default=128,
        ge=0,
        description="Fixed cost of a batch, in tokens. A batch is split where that saves more padding than this.",
    )

    def for_device(self, device_type: str, num_workers: int = 1) -> "BatchingSettings":
        """The same with its defaults filled in for a kind of torch device ("cpu", "cuda", ...).

        With a share of the cores a batch takes as long as one that is larger by as much with all of them.
        """
        default = CPU_BATCH_TOKENS // num_workers if device_type == "cpu" else ACCELERATOR_BATCH_TOKENS
        default = max(MIN_BATCH_TOKENS, default)
        return self.model_copy(update={"max_batch_tokens": self.max_batch_tokens or default})

    def at_speed(self, tokens_per_s: float | None) -> "BatchingSettings":
        """The same with a token budget that keeps to `max_batch_ms` at a speed, None if it is not known yet."""
        if self.max_batch_ms is None or tokens_per_s is None:
            return self
        affordable = max(MIN_BATCH_TOKENS, int(tokens_per_s * self.max_batch_ms / 1000))
        return self.model_copy(update={"max_batch_tokens": min(self.batch_tokens, affordable)})

    @property
    def batch_tokens(self) -> int:
        """`max_batch_tokens`, or its default on a CPU."""
        return self.max_batch_tokens or CPU_BATCH_TOKENS
