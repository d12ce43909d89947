"""What the policy service counts."""

from collections.abc import Callable

from steersman.policy.engine.port import SampleDelta
from steersman.policy.weights.records import Switch
from steersman.serving.metrics import Metrics

_PAUSE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class PolicyMetrics:
    """Tokens, samples, queue and weights of one replica."""

    def __init__(self, metrics: Metrics) -> None:
        self._prompt_tokens = metrics.counter("policy_prompt_tokens", "Prompt tokens of accepted requests.")
        self._tokens = metrics.counter("policy_generated_tokens", "Tokens sampled.")
        self._samples = metrics.counter("policy_samples", "Samples that ended.", ("finish_reason",))
        self._first_token = metrics.histogram(
            "policy_first_token_seconds", "Arrival to first token of streamed samples, in seconds."
        )
        self._in_flight = metrics.gauge("policy_samples_in_flight", "Samples running or queued.")
        self._tokens_in_flight = metrics.gauge(
            "policy_tokens_in_flight", "Tokens that samples running or queued may come to hold: prompts and max_tokens."
        )
        self._queued = metrics.gauge("policy_samples_queued", "Samples beyond what can decode together.")
        self._step = metrics.gauge("policy_weight_step", "Optimiser step of the active weights.")
        self._switches = metrics.counter("policy_weight_switches", "Activations and rollbacks.")
        self._received = metrics.counter("policy_weight_received_bytes", "Bytes of weight chunks received.")
        self._relayed = metrics.counter("policy_weight_relayed_bytes", "Bytes of chunk messages passed on to replicas.")
        self._relay_links_lost = metrics.counter(
            "policy_weight_relay_links_lost", "Replicas that were given up while chunks were passed on to them."
        )
        self._push = metrics.histogram("policy_weight_push_seconds", "Begin of a push to its activation, in seconds.")
        self._pause = metrics.histogram(
            "policy_weight_pause_seconds", "Standstill of generation at a switch.", buckets=_PAUSE_BUCKETS
        )

    def watch(self, num_in_flight: Callable[[], int], num_tokens: Callable[[], int], num_slots: int) -> None:
        """Reads the queue whenever the metrics are read; `num_slots` samples decode together."""
        self._in_flight.set_function(num_in_flight)
        self._tokens_in_flight.set_function(num_tokens)
        self._queued.set_function(lambda: max(0, num_in_flight() - num_slots))

    def accepted(self, num_prompt_tokens: int) -> None:
        """A request passed its checks."""
        self._prompt_tokens.inc(num_prompt_tokens)

    def sampled(self, delta: SampleDelta) -> None:
        """New tokens, or the end of a sample."""
        self._tokens.inc(len(delta.token_ids))
        if delta.finish_reason is not None:
            self._samples.labels(delta.finish_reason.value).inc()
            if delta.time_to_first_token_s is not None:
                self._first_token.observe(delta.time_to_first_token_s)

    def received(self, num_bytes: int) -> None:
        """Chunk data of one stream."""
        self._received.inc(num_bytes)

    def relayed(self, num_bytes: int, num_lost: int) -> None:
        """What one stream passed on, and to how many it could not."""
        self._relayed.inc(num_bytes)
        self._relay_links_lost.inc(num_lost)

    def switched(self, switch: Switch) -> None:
        """The weights changed."""
        self._step.set(switch.active.version.step)
        self._switches.inc()
        self._pause.observe(switch.pause_s)
        if switch.push_s is not None:
            self._push.observe(switch.push_s)
