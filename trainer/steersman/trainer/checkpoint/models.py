"""Models: loaded from a path or hub id, or built from a configuration and a seed; and saved as Hugging Face
files.

Three kinds share one backbone:

- the *actor*, a causal language model;
- the *scalar head*, a sequence classifier with one label, ``score`` on the last token: the reward model;
- the *critic*, a scalar head whose ``score`` is read at every token.

An actor and a scalar head of the same architecture name their backbone's tensors alike, so each can start
from the other's files; what is missing (the head) is drawn from the seed.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from steersman.serving.location import Location, locate, locate_tokenizer
from steersman.serving.tokenization import trusted
from steersman.trainer.checkpoint.atomic import CheckpointError, atomic_directory
from steersman.trainer.checkpoint.parts import Opened, WeightFiles, open_model, stored_tensors
from steersman.trainer.checkpoint.source import ModelSource

DType = Literal["float32", "bfloat16", "float16"]


def load_actor(
    source: ModelSource, *, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """The causal language model of ``source``, float32, on the CPU, dropout off.

    A model from scratch is drawn from ``seed`` and, where ``tokenizer`` is given, takes its vocabulary size
    and special tokens. CheckpointError for a missing or unreadable checkpoint and for an unknown architecture
    or setting.
    """
    with _seeded(seed):
        if source.config is not None:
            config = _config_from_scratch(source.config, tokenizer)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        else:
            model = _from_pretrained(AutoModelForCausalLM, source)
            _require_vocabulary(model, tokenizer)
    return _ready(model)


def load_scalar_head(
    source: ModelSource, *, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """A sequence classifier with one label, from a scalar head's files, an actor's (fresh ``score``), or from
    scratch.

    A fresh head is zero, so that scores start at zero whatever the width and the first gradient is the
    data's. Float32, on the CPU. CheckpointError as for :func:`load_actor`, and for an architecture without a
    ``score`` head.
    """
    with _seeded(seed):
        if source.config is not None:
            config = _config_from_scratch(source.config, tokenizer)
            config.num_labels = 1
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
            fresh = True
        else:
            model, info = _from_pretrained(AutoModelForSequenceClassification, source, num_labels=1, with_info=True)
            fresh = "score.weight" in info["missing_keys"]
    return _ready_scalar_head(model, tokenizer, fresh=fresh)


def open_actor(
    source: ModelSource, *, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None, in_parts: bool
) -> Opened:
    """What :func:`load_actor` gives; ``in_parts``, its weights are still in their files where that can be."""
    opened = _open(AutoModelForCausalLM, source, seed) if in_parts else None
    if opened is None:
        return Opened(model=load_actor(source, seed=seed, tokenizer=tokenizer))
    _require_vocabulary(opened.model, tokenizer)
    return replace(opened, model=_ready(opened.model))


def open_scalar_head(
    source: ModelSource, *, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None, in_parts: bool
) -> Opened:
    """What :func:`load_scalar_head` gives; ``in_parts``, its weights are still in their files where that can be."""
    opened = _open(AutoModelForSequenceClassification, source, seed, num_labels=1) if in_parts else None
    if opened is None:
        return Opened(model=load_scalar_head(source, seed=seed, tokenizer=tokenizer))
    assert opened.files is not None
    return replace(opened, model=_ready_scalar_head(opened.model, tokenizer, fresh="score.weight" not in opened.files))


def shift_scores(opened: Opened, *, mean: float, std: float) -> Opened:
    """The scalar head of ``opened`` with scores ``(score - mean) / std``; it has a bias then, to be learned too."""
    head, files = score_head(opened.model), opened.files
    with torch.no_grad():
        raw = {
            name: parameter if files is None or f"score.{name}" not in files else files.rows(f"score.{name}", 0, 1)
            for name, parameter in head.named_parameters()
        }
        weight = raw["weight"].float() / std
        bias = ((raw["bias"].float() if "bias" in raw else weight.new_zeros(1)) - mean) / std
    head.weight, head.bias = nn.Parameter(weight), nn.Parameter(bias)
    return replace(opened, files=files.without(("score.weight", "score.bias")) if files is not None else None)


def checkpoint_folder(source: ModelSource) -> Path | None:
    """Where the files of ``source`` are; None for a model from scratch. CheckpointError if there are none."""
    return _folder(locate, "checkpoint", source.path, source.revision) if source.path is not None else None


def score_head(model: PreTrainedModel) -> nn.Linear:
    """The head that turns hidden states into one score. CheckpointError if the architecture has none called
    ``score``.
    """
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise CheckpointError(
            f"{type(model).__name__} has no one-output linear head called 'score': use a decoder architecture "
            "such as qwen2 or llama with one label"
        )
    return head


def lm_head(model: PreTrainedModel) -> nn.Linear:
    """The output projection of an actor.

    CheckpointError where ``logits`` are not simply hidden states times this matrix (soft-capped or scaled
    logits).
    """
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise CheckpointError(f"{type(model).__name__} transforms its logits ({name}), which is not supported")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise CheckpointError(f"{type(model).__name__} has no linear output projection")
    return head


def adopt_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the model the tokenizer's special tokens, so that scorers and engines pad and stop as training
    did.
    """
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        value = getattr(tokenizer, name)
        if value is not None:
            setattr(model.config, name, value)
            if getattr(model, "generation_config", None) is not None:
                setattr(model.generation_config, name, value)


def load_tokenizer(path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer at ``path`` (a directory or hub id). CheckpointError if there is none or it has no EOS
    token.
    """
    folder = _folder(locate_tokenizer, "tokenizer", path, revision)
    try:
        tokenizer = trusted(AutoTokenizer.from_pretrained(folder), folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"no tokenizer can be loaded from {path!r}: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"the tokenizer of {path!r} has no EOS token: responses could not end")
    return cast(PreTrainedTokenizerBase, tokenizer)


def write_model(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Writes safetensors, configuration and tokenizer files into ``directory`` (not atomic by itself)."""
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def save_model(
    target: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    metadata: dict[str, Any] | None = None,
    files: Mapping[str, Any] | None = None,
) -> None:
    """Writes the model to ``target`` at once, with a manifest; ``from_pretrained(target)`` reads it.

    ``files`` are further JSON files by name. CheckpointError if ``AutoTokenizer`` would read another tokenizer from
    there than the one given.
    """
    with atomic_directory(target, metadata=metadata) as directory:
        write_model(directory, model, tokenizer)
        for name, content in (files or {}).items():
            (directory / name).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        if tokenizer is not None:
            _require_same_tokenizer(directory, tokenizer, model.config.model_type)


def require_savable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """CheckpointError where :func:`save_model` would refuse the two together: to be asked before training."""
    with tempfile.TemporaryDirectory(prefix="steersman-tokenizer-") as directory:
        model.config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        _require_same_tokenizer(Path(directory), tokenizer, model.config.model_type)


def load_weights(model: PreTrainedModel, directory: Path) -> None:
    """Puts the weights that :func:`write_model` wrote into ``model``, in place. CheckpointError if they do
    not fit.
    """
    try:
        model.load_state_dict(read_weights(model, directory))
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {directory} do not fit the model: {_first_line(error)}") from error


def read_weights(model: PreTrainedModel, directory: Path) -> dict[str, Tensor]:
    """The weights that :func:`write_model` wrote of a model like ``model``, whole, on the CPU. CheckpointError if
    there are none.
    """
    state = model.state_dict()
    files = WeightFiles.of(model, directory)
    if files is not None and all(name in files for name in state):
        # Views of the files: whoever takes rows of them holds no more.
        return {name: files.rows(name, 0, len(tensor) if tensor.ndim else 1) for name, tensor in state.items()}
    saved = _from_pretrained(type(model), ModelSource(path=str(directory))).state_dict()
    # Such as a bias that its class does not have.
    return cast("dict[str, Tensor]", saved | stored_tensors(directory, state.keys() - saved.keys()))


def resolve_device(device: str) -> torch.device:
    """``auto`` is CUDA if there, else the CPU; anything else as torch reads it. ValueError for a device that
    is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, must be 'auto', 'cpu' or 'cuda[:N]'") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but this machine has no CUDA device; use 'auto' or 'cpu'")
    return resolved


class _seeded:  # noqa: N801 - reads as a statement
    """Draws from ``seed`` inside, and leaves the generators outside as they were."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._fork = torch.random.fork_rng()

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *exc: object) -> None:
        self._fork.__exit__(None, None, None)


def _config_from_scratch(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Any:
    settings = dict(settings)
    model_type = settings.pop("model_type")
    if tokenizer is not None:
        settings.setdefault("vocab_size", len(tokenizer))
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            settings.setdefault(name, getattr(tokenizer, name))
    try:
        defaults = AutoConfig.for_model(model_type)
        unknown = sorted(name for name in settings if not hasattr(defaults, name))
        if unknown:
            raise CheckpointError(f"config.{unknown[0]} is not a setting of model_type {model_type!r}")
        config = AutoConfig.for_model(model_type, **settings)
    except CheckpointError:
        raise
    except Exception as error:  # configuration classes raise whatever their validators do
        raise CheckpointError(f"config is not valid for model_type {model_type!r}: {_first_line(error)}") from error
    if tokenizer is not None and config.vocab_size < len(tokenizer):
        raise CheckpointError(
            f"config.vocab_size is {config.vocab_size}, must be at least the tokenizer's {len(tokenizer)}"
        )
    return config


def _open(factory: Any, source: ModelSource, seed: int, **settings: Any) -> Opened | None:
    folder = checkpoint_folder(source)
    if folder is None:
        return None
    with _seeded(seed):
        return open_model(factory, folder, **settings)


def _from_pretrained(factory: Any, source: ModelSource, *, with_info: bool = False, **settings: Any) -> Any:
    path = cast(str, source.path)
    folder = _folder(locate, "checkpoint", path, source.revision)
    try:
        return factory.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,  # pickled weights are never read
            output_loading_info=with_info,
            **settings,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"no model can be loaded from {path!r}: {_first_line(error)}") from error


def _folder(find: Callable[[str, str, str | None], Location], field: str, path: str, revision: str | None) -> Path:
    try:
        return find(field, path, revision).folder
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _require_same_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerBase, model_type: str) -> None:
    """For some architectures (qwen2 is one) ``AutoTokenizer`` forces a class of its own on the saved files,
    and then splits text otherwise without a word. Services read tokenizers through it, so a model that would
    be misread is not written.
    """
    known = cast(str, tokenizer.decode(list(range(min(len(tokenizer), 200))), skip_special_tokens=True))
    probe = known + " The end, 1 2 3.\n\nx"
    read_back = AutoTokenizer.from_pretrained(directory)
    if read_back(probe).input_ids != tokenizer(probe).input_ids:
        raise CheckpointError(
            f"AutoTokenizer reads a {type(read_back).__name__} for model_type {model_type!r}, which splits text "
            "otherwise than the tokenizer given: take another model_type, such as 'llama' or 'qwen3', or that "
            "class's own kind of tokenizer"
        )


def _require_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None and len(tokenizer) > rows:
        raise CheckpointError(f"the tokenizer has {len(tokenizer)} tokens, must be at most the model's {rows}")


def _ready_scalar_head(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, fresh: bool
) -> PreTrainedModel:
    head = score_head(model)
    if fresh:
        nn.init.zeros_(head.weight)
    if tokenizer is not None:
        adopt_special_tokens(model, tokenizer)
    return _ready(model)


def _ready(model: Any) -> PreTrainedModel:
    # Evaluation mode once and for all: dropout would make old and new log-probs differ without an update.
    return cast(PreTrainedModel, model.eval())


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
