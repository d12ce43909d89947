"""Weights on their way to the policy replicas.

`image` is an immutable copy of the weights of one version and knows how they are cut into chunks and hashed; `encode`
makes chunks of the difference between two images.
`publisher` drives every replica to the wanted version: `replica` is one transaction with one of them, `cargo` what it
sends, `delivery` how that gets there.
"""
