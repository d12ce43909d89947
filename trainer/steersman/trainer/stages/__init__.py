"""The stages of RLHF, each runnable alone: supervised fine-tuning, reward model, PPO."""
