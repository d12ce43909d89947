"""New weights for a live model: `store` is the transaction, over host copies (`memory`, `manifest`),
coverage of what arrived (`coverage`) and the start-up checkpoint (`checkpoint`). No gRPC, no torch.
"""
