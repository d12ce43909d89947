"""Weights that stay in their safetensors files until each rank reads its rows of them.

    opened = open_model(AutoModelForCausalLM, folder)     # parameters on the meta device: shapes without memory
    opened.files.rows("model.embed_tokens.weight", 0, 1000)

`from_pretrained` does more than read: it renames, merges and splits tensors of some architectures, takes apart what is
quantized, and draws what is missing. Here is what needs none of that but a head to be drawn; for all else `open_model`
gives None, and the caller loads the model whole.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

_ADAPTER_FILE: Final = "adapter_config.json"


class WeightFiles:
    """The tensors of some safetensors files, by the names that a model has for them.

    What it gives are views of the mapped files where they can be, in the type that they are stored in.
    """

    def __init__(self, slices: Mapping[str, Any]) -> None:
        self._slices = slices

    @classmethod
    def of(cls, model: PreTrainedModel, folder: Path) -> Self | None:
        """Those in `folder` for the parameters and buffers of `model`, which may have no values yet, or be sharded.

        None if there are no such files, or if more has to be done with a tensor than to rename its root.
        """
        named: dict[int, list[str]] = {}
        shapes = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            named.setdefault(id(tensor), []).append(name)
            shapes[name] = list(tensor.shape)
        conversions = get_model_conversion_mapping(model)
        slices: dict[str, Any] = {}
        for path in _files(folder):
            file: Any = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 - no mapping
                if any(conversion.rename_source_key(key)[1] is not None for conversion in conversions):
                    return None
                if (name := _own_name(key, model.base_model_prefix, shapes)) in shapes:
                    slices[name] = file.get_slice(key)
        if not slices or any(part.get_shape() != shapes[name] for name, part in slices.items()):
            return None
        for names in named.values():
            # Tied tensors are stored under one of their names, or under several.
            found = [slices[name] for name in names if name in slices]
            if any(not torch.equal(other[:], found[0][:]) for other in found[1:]):
                return None
            slices |= dict.fromkeys(names, found[0]) if found else {}
        return cls(slices)

    def without(self, names: Collection[str]) -> "WeightFiles":
        """The same but for some tensors, of which the model has other values."""
        return WeightFiles({name: part for name, part in self._slices.items() if name not in names})

    def __contains__(self, name: str) -> bool:
        return name in self._slices

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor; those beyond its last are zero, as of embeddings that were made longer.

        Of one that has no dimensions, all.
        """
        part = self._slices[name]
        shape = part.get_shape()
        if not shape:
            return torch.as_tensor(part[...])
        rows: Tensor = part[min(start, shape[0]) : min(stop, shape[0])]
        if num_beyond := stop - start - len(rows):
            rows = torch.cat([rows, rows.new_zeros(num_beyond, *shape[1:])])
        return rows


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model, and where its values are to come from.

    Attributes:
        model: has its buffers; parameters that `files` hold are on the meta device.
        files: None if the model has all its values.
    """

    model: PreTrainedModel
    files: WeightFiles | None = None


def open_model(factory: Any, folder: Path, **settings: Any) -> Opened | None:
    """What `factory.from_pretrained(folder, dtype=torch.float32, **settings)` gives, its weights left in their files.

    A head that they lack has values, drawn as there from torch's generator. None where `from_pretrained` alone can
    read them, or say what is wrong.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **settings)
        if getattr(config, "quantization_config", None) is not None or (folder / _ADAPTER_FILE).exists():
            return None
        with _no_values():
            model: PreTrainedModel = factory.from_config(config, dtype=torch.float32)
        files = WeightFiles.of(model, folder)
    except Exception:  # whatever it is, `from_pretrained` comes upon it too
        return None
    if files is None or not _draw_missing(model, files):
        return None
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return Opened(model=model, files=files)


@contextmanager
def _no_values() -> Iterator[None]:
    """Parameters made inside go to the meta device at once. Buffers are computed: no file holds most of them."""

    def let_go(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # as it is: a tied one has to stay the same object
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(let_go)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def stored_tensors(folder: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Those of the safetensors files in `folder` that go by one of `names` there."""
    found: dict[str, Tensor] = {}
    for path in _files(folder):
        file: Any = safe_open(path, framework="pt")
        found |= {name: file.get_tensor(name) for name in file.keys() if name in names}  # noqa: SIM118 - no mapping
    return found


def _files(folder: Path) -> list[Path]:
    if (folder / SAFE_WEIGHTS_NAME).exists():
        return [folder / SAFE_WEIGHTS_NAME]
    if not (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        return []
    index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def _own_name(key: str, prefix: str, names: Mapping[str, Any]) -> str:
    """The model's name of a tensor: files of the backbone alone leave out what it is called in a larger model."""
    if (stripped := key.removeprefix(f"{prefix}.")) in names:
        return stripped
    return f"{prefix}.{key}" if f"{prefix}.{key}" in names else key


def _draw_missing(model: PreTrainedModel, files: WeightFiles) -> bool:
    """Gives a head that `files` lack its first values; False if they lack anything else."""
    missing = {name for name, _ in model.named_parameters() if name not in files}
    for head in (getattr(model, "score", None), model.get_output_embeddings()):
        if not isinstance(head, nn.Module):
            continue
        own = {name for name, module in model.named_modules() if module is head}
        names = {f"{name}.{key}" for name in own for key, _ in head.named_parameters(recurse=False)}
        if names and names <= missing:
            for key, parameter in list(head.named_parameters(recurse=False)):
                setattr(head, key, nn.Parameter(torch.empty(parameter.shape), requires_grad=parameter.requires_grad))
            model._init_weights(head)  # type: ignore[no-untyped-call]
            missing -= names
    return not missing
