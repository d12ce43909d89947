"""What a caller may do. Servers check it, the command writes it into entries of the list of callers."""

from enum import StrEnum


class Role(StrEnum):
    """What a caller may do. Reading what a service is, and the status of a call, is for every known caller."""

    GENERATE = "generate"
    """Draw samples from a policy."""
    LOGPROBS = "logprobs"
    """Ask a reference for log-probs."""
    SCORE = "score"
    """Ask for scores, in whatever protocol."""
    PUSH_WEIGHTS = "push_weights"
    """Replace the weights of a policy."""
    MANAGE_MODELS = "manage_models"
    """Load, switch and unload reward models."""
    MANAGE_JOBS = "manage_jobs"
    """Create, cancel and resume training jobs."""
