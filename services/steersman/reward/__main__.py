"""`python -m steersman.reward --config FILE` or `--model PATH`: serves scores."""

import sys

from steersman.reward.settings import RewardSettings
from steersman.serving.app import main
from steersman.serving.metrics import Metrics
from steersman.serving.service import Service


async def build(settings: RewardSettings, metrics: Metrics) -> Service:
    """Loads all scorers and warms them up."""
    # Heavy imports wait until the settings are known to be good.
    from steersman.reward.build import build_handler
    from steersman.reward.servicer import RewardService

    return RewardService(*await build_handler(settings, metrics))


if __name__ == "__main__":
    sys.exit(main("reward", RewardSettings, build))
