"""The model behind the reference service: `port` says what is needed of it, `torch_engine` has it in PyTorch."""
