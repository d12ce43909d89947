"""The trainer: supervised fine-tuning, reward models and PPO, as jobs behind TrainerService."""
