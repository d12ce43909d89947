"""Warnings of vLLM and torch that say nothing to who runs a service, because we chose what they warn of.

Each is named by its logger and how it begins: whatever else the same logger has to say is shown.
"""

import logging
import warnings
from typing import Final

_MEANINGLESS: Final[dict[str, tuple[str, ...]]] = {
    "vllm.engine.arg_utils": (
        # On CPU the engine shares our process, where nothing else draws from the global generators.
        "The global random seed is set to",
        # Off on CPU: a prompt in parts would end the engine at the first seeded request.
        "This model does not officially support disabling chunked prefill",
    ),
    "vllm.config.vllm": (
        # Eager is what we ask for on CPU: compiling costs the first request ten seconds and wins nothing.
        "Enforce eager set",
        "Inductor compilation was disabled",
        # There is no Triton on CPU; the runner that is taken instead is the one that we test.
        "Model Runner V2 requires Triton",
    ),
    "vllm.platforms.cpu": (
        "Triton is not installed",
        # Of models with a state space; the type is the one that all others have.
        "Reset SSM cache type",
    ),
    "vllm.v1.worker.cpu_worker": (
        # Advice on preloading allocators, for whole sockets.
        "%s is not found in LD_PRELOAD",
        "CPU backend doesn't allow to use",
    ),
    # The number of threads is a setting of ours.
    "vllm.utils.torch_utils": ("OMP_NUM_THREADS=%s is set",),
    # Models without a tokenizer are served by token ids.
    "vllm.renderers.base": ("Using None for BOS", "Using None for EOS"),
    "torch._library.triton": ("Triton not available",),
}


def silence() -> None:
    """Keeps them out of the log. Doing it again changes nothing."""
    for name, beginnings in _MEANINGLESS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Filter) for known in logger.filters):
            logger.addFilter(_Filter(beginnings))
    # vLLM looks through torch's attributes for kernels, and comes upon a deprecated one.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.reduce_op` is deprecated", category=FutureWarning)


class _Filter(logging.Filter):
    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self._beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or not str(record.msg).startswith(self._beginnings)
