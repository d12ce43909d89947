"""The policy service: samples from the model that is being trained, and takes its new weights while it
serves.

Data path: `servicer` (protobuf to dataclass) over `handler` (checks, streams) over `engine.port` (what a
generation engine is) with `engine.vllm_engine` as the real one. Weights: `weights.service` over
`weights.store` (host copies, transaction) over the same port.
"""
