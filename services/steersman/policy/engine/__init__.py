"""The generation engine: `port` says what the service needs of one, `vllm_engine` is vLLM's `AsyncLLM`
behind it.

Only modules of this package import vLLM, and none of them is imported before the settings are known,
because vLLM reads its environment variables on import.
"""
