"""The reward service: scores of responses by scalar-head models and by Python functions.

servicer.py (messages) -> handler.py (names, item outcomes, streams) -> scorers: model_scorer.py over engine/ (the
model), function_scorer.py over plugin.py (what authors of functions need)
"""
