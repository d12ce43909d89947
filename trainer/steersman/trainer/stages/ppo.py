"""Proximal policy optimisation against the policy, reference and reward services.

`ppo_config` holds the settings, `ppo_services` the network side, `ppo_batch` and `ppo_learner` the update,
`ppo_loop` the order of things.
"""

from steersman.trainer.stages.ppo_config import PpoConfig
from steersman.trainer.stages.ppo_loop import PpoResult, run_ppo

__all__ = ["PpoConfig", "PpoResult", "run_ppo"]
