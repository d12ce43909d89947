"""Scores of a sequence classifier with one label by vLLM's pooling runner: raw logits, no activation.

The engine runs in processes of its own, so that several models can be served, and loaded and unloaded, side by side.
Its front is driven by one thread, which vLLM's synchronous engine asks for. Prompts that are scored again are found in
vLLM's prefix cache, across batches too: that, and GPU kernels, is what this backend is for.
"""

import contextlib
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig
from vllm import PoolingParams
from vllm.config import PoolerConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs.engine import tokens_input
from vllm.v1.engine.llm_engine import LLMEngine

from steersman.reward.engine.footprint import weight_bytes
from steersman.reward.engine.port import Normalization
from steersman.reward.engine.torch_engine import read_normalization
from steersman.reward.settings import ModelScorerSettings
from steersman.serving.models import Checkpoint, config_eos_token_ids, find_checkpoint, sequence_limit
from steersman.serving.vllm_environment import BLOCK_TOKENS, runs_on_cpu
from steersman.wire.identity import ModelInfo

_MIB: Final = 2**20
_CPU_CACHE_MIB: Final = 512


class VllmScoreEngine:
    """A sequence classifier with one label in vLLM. `vllm_environment.prepare` comes before this module is imported."""

    shares_prefixes = True
    num_workers = 1

    def __init__(
        self,
        arguments: EngineArgs,
        info: ModelInfo,
        *,
        normalization: Normalization,
        encoding: str | None = None,
        parameter_bytes: int = 0,
    ) -> None:
        """Starts the engine and waits until the model is loaded."""
        self.model = info
        self.normalization = normalization
        self.encoding = encoding
        self.parameter_bytes = parameter_bytes
        self.device_type = _device_type()
        self._parameters = PoolingParams(task="classify", use_activation=False)
        self._ids = itertools.count()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"vllm-{info.name}")
        self._engine: LLMEngine = self._thread.submit(LLMEngine.from_engine_args, arguments).result()

    @classmethod
    def load(cls, field: str, settings: ModelScorerSettings) -> "VllmScoreEngine":
        """Loads what the settings name. Raises `ValueError` that names the setting below `field` that is wrong."""
        found = find_checkpoint(f"{field}.model", settings.model, settings.revision)
        config = AutoConfig.from_pretrained(found.source)
        if config.num_labels != 1:
            raise ValueError(
                f"{field}.model: has {config.num_labels} labels, allowed: a sequence classifier with 1 label"
            )
        info = ModelInfo(
            name=found.name,
            revision=found.revision,
            vocab_size=config.get_text_config().vocab_size,
            max_sequence_tokens=sequence_limit(config, settings.max_sequence_tokens),
            dtype=str(config.dtype or torch.float32).removeprefix("torch.")
            if settings.dtype == "auto"
            else settings.dtype,
            eos_token_ids=config_eos_token_ids(config),
        )
        normalization = read_normalization(f"{field}.model", config)
        try:
            return cls(
                _arguments(found, info, settings),
                info,
                normalization=normalization,
                encoding=getattr(config, "reward_encoding", None),
                parameter_bytes=weight_bytes(Path(found.source), settings.dtype),
            )
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{field}.model: cannot be served by vLLM: {error}") from error

    def score(self, rows: Sequence[NDArray[np.int32]]) -> list[float]:
        """See `ScoreEngine.score`."""
        return self._thread.submit(self._score, rows).result()

    def close(self) -> None:
        """Ends the engine's processes."""
        with contextlib.suppress(RuntimeError):
            self._thread.submit(self._engine.engine_core.shutdown).result()
        self._thread.shutdown(wait=False)

    def _score(self, rows: Sequence[NDArray[np.int32]]) -> list[float]:
        waiting: dict[str, int] = {}
        try:
            for index, row in enumerate(rows):
                asked = str(next(self._ids))
                self._engine.add_request(asked, tokens_input(row.tolist()), self._parameters)
                waiting[asked] = index
            scores = [float("nan")] * len(rows)
            while waiting:
                for output in self._engine.step():
                    index = waiting.pop(output.request_id)
                    scores[index] = _value(output)
            return scores
        except Exception:
            # What is left in the engine would come out of a later call.
            self._engine.abort_request(list(waiting))
            raise


def _dtype_name(config: Any) -> str:
    return str(config.dtype or torch.float32).removeprefix("torch.")


def _device_type() -> str:
    return "cpu" if runs_on_cpu() else "cuda"


def _value(output: Any) -> float:
    data: torch.Tensor = output.outputs.data
    return float(data.float().reshape(-1)[0])


def _arguments(found: Checkpoint, info: ModelInfo, settings: ModelScorerSettings) -> EngineArgs:
    on_cpu = runs_on_cpu()
    batching = settings.batching.for_device(_device_type())
    cache_mib = settings.vllm.cache_mib or (_CPU_CACHE_MIB if on_cpu else None)
    return EngineArgs(
        model=found.source,
        tokenizer=found.source,
        runner="pooling",
        dtype=info.dtype,  # type: ignore[arg-type]
        max_model_len=info.max_sequence_tokens,
        max_num_batched_tokens=max(batching.batch_tokens, info.max_sequence_tokens),
        max_num_seqs=batching.max_batch_items,
        enable_prefix_caching=settings.share_prefixes,
        enforce_eager=on_cpu,
        block_size=BLOCK_TOKENS,
        kv_cache_memory_bytes=cache_mib * _MIB if cache_mib is not None else None,
        gpu_memory_utilization=settings.vllm.gpu_memory_fraction,
        # Items arrive as token ids; the service has tokenized them.
        skip_tokenizer_init=True,
        pooler_config=PoolerConfig(use_activation=False),
        use_tqdm_on_load=False,
        disable_log_stats=True,
    )
