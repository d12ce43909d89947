"""Entry point of group `vllm.general_plugins`: vLLM calls `register` in each of its processes."""

from steersman.policy.engine import orphans

BACKEND = "steersman"
"""Name of our weight transfer engine in vLLM's registry."""


def register() -> None:
    """Adds our weight transfer engine to vLLM's registry. Calling it again changes nothing."""
    orphans.end_with_parent_if_child()
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "steersman.policy.engine.weight_transfer", "HostWeightTransferEngine"
        )
