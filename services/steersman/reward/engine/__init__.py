"""The model behind a scorer: `port` says what is needed of it, `torch_engine` has it in PyTorch."""
