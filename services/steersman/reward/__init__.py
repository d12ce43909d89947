"""The reward service: scores of responses by scalar-head models, by Python functions, and by ensembles of both.

servicer.py (messages) -> handler.py (names, item outcomes, streams) -> roster.py (which name leads to what) ->
scorers: model_scorer.py over engine/ (the model) and cache.py, function_scorer.py over plugin.py (what authors of
functions need), ensemble.py over others

model_servicer.py (messages) -> model_manager.py (load, switch, unload) -> served_model.py (a model and what it owes)
"""
