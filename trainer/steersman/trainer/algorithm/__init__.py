"""The mathematics of RLHF as pure torch functions: tensors in, tensors out, nothing else imported.

Shape suffixes used in every file of this package:

- ``B`` sequences (prompt and response pairs) of a batch, ``T`` tokens of a response or of a flat packed
  batch,
- ``V`` vocabulary, ``D`` hidden width, ``N`` prompts, ``G`` samples of one prompt, ``P`` pairs of a
  comparison.

``...`` stands for any leading shape: functions that work token by token take ``[B, T]`` and flat ``[T]``
alike. Log-probabilities and KL are in nats. A mask is boolean and true where the token counts.

Losses are *sums divided by a given denominator* (the number of counted tokens of the whole batch), so that
splitting a batch into micro-batches or over data-parallel ranks leaves the gradient as it is. Metrics come
back as sums for the same reason; :class:`~steersman.trainer.algorithm.metrics.MetricSums` adds them up and
divides once.
"""
