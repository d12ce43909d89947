"""Rollouts over the network: prompts to the policy, each completion at once to reward and reference, whole
samples back.

`collector` holds the invariants (each sample exactly once, or dropped and counted), `replicas` spreads
prompts over policy replicas and keeps stale ones out, `coalesce` makes calls of several out of single completions,
`ports` are the seams and `adapters` their gRPC side.
"""
