"""What the author of a scoring function needs. Imports nothing heavy.

    from collections.abc import Sequence
    from steersman.reward.plugin import ScorerInput

    def brevity(items: Sequence[ScorerInput]) -> list[float | None]:
        return [-len(item.response) / 100 for item in items]

A scoring function gets a batch and returns one number an item, in order; it may be `async`. It runs on a thread of its
own, several at a time (`max_concurrency`), so it must not rely on being called alone. What goes wrong concerns
single items: an item for which it returns None or NaN fails, and a call that raises or takes longer than
`timeout_seconds` is repeated item by item, so that only the items that cause it fail. A failed item has no score.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, TypeAlias

_NO_CONTEXT: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTurn:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerInput:
    """One item for a scoring function.

    `prompt` and `response` are text. For a conversation, `messages` has the turns before the response, and `prompt`
    is the content of the last of them. `context` holds what the caller sent along, for example
    `{"ground_truth": "42"}`; its numbers are floats.
    """

    prompt: str
    response: str
    messages: tuple[ChatTurn, ...] = ()
    context: Mapping[str, Any] = field(default_factory=lambda: _NO_CONTEXT)


Scores: TypeAlias = Sequence[float | None]
ScoreFunction: TypeAlias = Callable[[Sequence[ScorerInput]], Scores | Awaitable[Scores]]


def load_function(field: str, target: str) -> ScoreFunction:
    """The function that "package.module:name" or "/path/to/file.py:name" names; `field` names the setting in errors.

    Raises `ValueError` if it cannot be imported or is not a function of one list.
    """
    source, _, name = target.rpartition(":")
    try:
        found: Any = _import_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise ValueError(f"{field}: is {target!r}, which cannot be imported: {error!r}") from error
    if not callable(found):
        raise ValueError(f"{field}: is {target!r}, a {type(found).__name__}, allowed: a function")
    try:
        inspect.signature(found).bind([])
    except TypeError as error:
        raise ValueError(f"{field}: is {target!r}, allowed: a function of one list of items: {error}") from None
    except ValueError:
        pass  # A built-in without a signature: the first call tells.
    function: ScoreFunction = found
    return function


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"steersman_scorer_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
