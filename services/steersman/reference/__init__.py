"""The reference service: log-probs of given tokens under a frozen causal language model.

servicer.py (messages) -> handler.py (checks, batching) -> engine/ (the model)
"""
