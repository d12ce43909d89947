"""Writes docs/configuration.md from the settings classes, so that the page cannot drift from the code.

`--check` writes nothing and fails when the committed page is not what the code says.
"""

import argparse
import sys
import types
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
INTRODUCTION = """# Configuration

Every setting, its type, its default. Unknown keys are refused, and a bad value is answered with its path, the value
and what is allowed. This page is written by `scripts/document_settings.py`.

**Servers** read flags over environment over a YAML file over defaults: `--generation.max-tokens 64`,
`STEERSMAN_GENERATION__MAX_TOKENS=64`, or `generation: {max_tokens: 64}` in the file that `--config` or
`STEERSMAN_CONFIG` names.

**Jobs** are YAML files for `steersman train KIND FILE`; `--set path.to.key=value` changes single settings.
"""
SECTIONS = (
    ("policy", "`python -m steersman.policy`", "steersman.policy.settings", "PolicySettings"),
    ("reference", "`python -m steersman.reference`", "steersman.reference.settings", "ReferenceSettings"),
    ("reward", "`python -m steersman.reward`", "steersman.reward.settings", "RewardSettings"),
    ("trainer", "`python -m steersman.trainer`", "steersman.trainer.jobs.settings", "TrainerSettings"),
    ("sft", "Job kind `sft`", "steersman.trainer.stages.sft_config", "SftConfig"),
    ("reward_model", "Job kind `reward_model`", "steersman.trainer.stages.reward_model_config", "RewardModelConfig"),
    ("ppo", "Job kind `ppo`", "steersman.trainer.stages.ppo_config", "PpoConfig"),
)


def type_name(annotation: Any) -> str:
    """A type as a reader writes it."""
    if annotation is None or annotation is type(None):
        return "none"
    origin = get_origin(annotation)
    if origin is typing.Annotated:
        return type_name(get_args(annotation)[0])
    if origin is typing.Literal:
        return " or ".join(str(value) for value in get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in get_args(annotation))
    if origin in (list, tuple, set, frozenset):
        inner = dict.fromkeys(type_name(a) for a in get_args(annotation) if a is not Ellipsis)
        return f"list of {', '.join(inner)}"
    if origin is dict:
        key, value = get_args(annotation)
        return f"mapping of {type_name(key)} to {type_name(value)}"
    words = {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}
    name: str = annotation.__name__
    return words.get(name, name)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Settings classes that a type mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def limits(field: FieldInfo) -> str:
    """The range of a number or the length of a list."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": "length at least"}
    found = [(name, getattr(item, name)) for item in field.metadata for name in words if hasattr(item, name)]
    return ", ".join(f"{words[name]} {value}" for name, value in found if value is not None)


def default_of(field: FieldInfo) -> str:
    """The default as YAML writes it; empty if the setting is required."""
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "*required*"
    if isinstance(value, BaseModel):
        return "see below"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`" if str(value) else "empty"


def rows(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """One table row a setting; nested settings follow with their path."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        description = " ".join(filter(None, [field.description, f"({limits(field)})" if limits(field) else ""]))
        cells = (f"`{path}`", type_name(field.annotation), default_of(field), description)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        for nested in models_in(field.annotation):
            keyed = get_origin(field.annotation) is dict
            yield from rows(nested, f"{path}.{'NAME.' if keyed else ''}")


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for name, title, module, class_name in SECTIONS:
        model = getattr(import_module(module), class_name)
        header = f"## {name}\n\n{title}\n\n| setting | type | default | meaning |\n| --- | --- | --- | --- |\n"
        parts.append(header + "\n".join(rows(model)) + "\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        sys.exit("docs/configuration.md is stale, run scripts/document_settings.py")


if __name__ == "__main__":
    main()
