"""The forms in which preference and demonstration data come, each made into a record.

- ``transcript``: ``chosen`` and ``rejected``, texts whose turns begin with ``\\n\\nHuman:`` and ``\\n\\nAssistant:``,
  alike up to the last ``Assistant`` turn (the HH form).
- ``preference``: ``prompt``, ``chosen``, ``rejected``, text or messages; messages may repeat the prompt; ``margin`` if
  there is one. Without ``prompt``, ``chosen`` and ``rejected`` are messages that are alike up to the last.
- ``candidates``: ``input_text``, two candidates (``candidate1`` and ``candidate2``, or ``candidate_0`` and
  ``candidate_1``), text or messages, and the number of the better one, ``human_preference`` or ``choice``, counted from
  ``preference_base``.
- ``ranked``: ``prompt``, ``responses``, ``ranks`` (1 is best, equal is a tie); without ``ranks`` the responses stand
  best to worst.

  Each of these may have ``subset``, by which an evaluation tells rows apart, and ``annotator``, who ranked.
- ``messages``: a conversation that ends with the assistant's turn.
- ``completion``: ``prompt`` and ``completion`` (or ``response``).
- ``prompt``: ``prompt`` alone, or ``input_text`` alone.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast, get_args

from steersman.trainer.data.records import (
    Comparison,
    Context,
    Demonstration,
    Message,
    Origin,
    Prompt,
    Record,
    Role,
)
from steersman.trainer.data.rows import BadRow, Row
from steersman.trainer.data.settings import Form

ROLES: Final = get_args(Role)
_TURN: Final = re.compile(r"\n\n(Human|Assistant):")
_CANDIDATE_NAMES: Final = (("candidate1", "candidate2"), ("candidate_1", "candidate_2"), ("candidate_0", "candidate_1"))
_MAX_LABEL_CHARS: Final = 64
_CHOICE_NAMES: Final = ("human_preference", "choice")


class _Unfit(ValueError):
    """Why a row does not fit its form; the caller adds file and line."""


@dataclass(frozen=True, kw_only=True)
class FormOptions:
    """``preference_base``: the number of the first candidate, 0 or 1; None until :func:`infer_preference_base` found
    it.
    """

    preference_base: int | None = None


def detect_form(fields: Mapping[str, Any]) -> Form | None:
    """The form of a row by the names it has, None if they fit no form."""
    names = {name for name, value in fields.items() if value is not None}
    if {"chosen", "rejected"} <= names:
        chosen = fields["chosen"]
        transcript = "prompt" not in names and isinstance(chosen, str) and _TURN.match("\n\n" + chosen.lstrip())
        return "transcript" if transcript else "preference"
    if "input_text" in names and any({*pair} <= names for pair in _CANDIDATE_NAMES):
        return "candidates"
    if {"prompt", "responses"} <= names:
        return "ranked"
    if "messages" in names:
        return "messages"
    if "prompt" in names and names & {"completion", "response"}:
        return "completion"
    return "prompt" if names & {"prompt", "input_text"} else None


def parse_row(row: Row, form: Form, options: FormOptions) -> Record:
    """The record that ``row`` holds in ``form``. BadRow says which field is wrong and what it must be."""
    try:
        record = _PARSERS[form](row.fields, row.origin, options)
        if not isinstance(record, Comparison):
            return record
        return replace(record, subset=_label(row.fields, "subset"), annotator=_label(row.fields, "annotator"))
    except _Unfit as error:
        raise BadRow(row.origin, str(error)) from None


def infer_preference_base(rows: Iterable[Row]) -> int | None:
    """The number of the first candidate in a file of ``candidates`` rows: 0 or 1, None if the rows leave it open.

    Names that count from 0 (``candidate_0``) say 0; else a 0 among the choices says 0 and a 2 says 1. Both: BadRow.
    """
    seen: dict[int, Row] = {}
    for row in rows:
        if row.fields.get("candidate_0") is not None:
            return 0
        choice = _first(row.fields, _CHOICE_NAMES)
        if isinstance(choice, int) and not isinstance(choice, bool):
            seen.setdefault(choice, row)
    if 0 in seen and 2 in seen:
        raise BadRow(
            seen[2].origin,
            f"human_preference is 2, but {seen[0].origin} has 0: the choices count neither from 0 nor from 1",
        )
    return 0 if 0 in seen else 1 if 2 in seen else None


def parse_transcript(text: str) -> tuple[Message, ...]:
    """The turns of an HH transcript without their outer white space. ValueError if it does not begin with a turn."""
    pieces = _TURN.split("\n\n" + text.lstrip())
    if pieces[0].strip():
        raise _Unfit("a transcript must begin with '\\n\\nHuman:' or '\\n\\nAssistant:'")
    speakers, contents = pieces[1::2], pieces[2::2]
    return tuple(
        Message(role="user" if speaker == "Human" else "assistant", content=content.strip())
        for speaker, content in zip(speakers, contents, strict=True)
    )


def _transcript(fields: Mapping[str, Any], origin: Origin, _: FormOptions) -> Comparison:
    chosen, rejected = (parse_transcript(_text(fields, name)) for name in ("chosen", "rejected"))
    return _compare_conversations(chosen, rejected, origin, margin=_margin(fields))


def _preference(fields: Mapping[str, Any], origin: Origin, _: FormOptions) -> Comparison:
    chosen, rejected, margin = fields.get("chosen"), fields.get("rejected"), _margin(fields)
    prompt = fields.get("prompt")
    for name in ("chosen", "rejected"):
        _require(name, fields.get(name))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise _Unfit("chosen and rejected must both be text or both be messages")
    if isinstance(chosen, str):
        if prompt is None:
            raise _Unfit("prompt is missing")
        return _comparison(
            _context("prompt", prompt), [_text(fields, n) for n in ("chosen", "rejected")], origin, margin
        )
    conversations = [_messages(name, fields.get(name)) for name in ("chosen", "rejected")]
    if prompt is not None:
        given = _as_messages(_context("prompt", prompt))
        conversations = [c if c[: len(given)] == given and len(c) > len(given) else given + c for c in conversations]
    return _compare_conversations(conversations[0], conversations[1], origin, margin=margin)


def _candidates(fields: Mapping[str, Any], origin: Origin, options: FormOptions) -> Comparison:
    names = next((p for p in _CANDIDATE_NAMES if all(fields.get(n) is not None for n in p)), None)
    if names is None:
        raise _Unfit("candidate1 and candidate2 (or candidate_0 and candidate_1) must both be there")
    responses = [_response(name, fields[name]) for name in names]
    choice = _first(fields, _CHOICE_NAMES)
    if choice == "tie":
        return _comparison(_context("input_text", fields.get("input_text")), responses, origin, None, ranks=(1, 1))
    _require(" or ".join(_CHOICE_NAMES), choice)
    base = options.preference_base
    if base is None:
        raise _Unfit(
            "human_preference does not say whether it counts from 0 or 1 (every choice is 1): set preference_base"
        )
    if isinstance(choice, bool) or choice not in (base, base + 1):
        raise _Unfit(f"human_preference is {_shown(choice)}, must be {base}, {base + 1} or 'tie'")
    ranks = (1, 2) if choice == base else (2, 1)
    return _comparison(_context("input_text", fields.get("input_text")), responses, origin, None, ranks=ranks)


def _ranked(fields: Mapping[str, Any], origin: Origin, _: FormOptions) -> Comparison:
    responses = fields.get("responses")
    _require("responses", responses)
    if not isinstance(responses, Sequence) or isinstance(responses, str) or len(responses) < 2:
        raise _Unfit(f"responses is {_shown(responses)}, must be a list of at least two")
    texts = [_response(f"responses[{number}]", response) for number, response in enumerate(responses)]
    ranks = fields.get("ranks")
    if ranks is None:
        ranks = range(1, len(texts) + 1)
    elif not isinstance(ranks, Sequence) or any(isinstance(r, bool) or not isinstance(r, int) for r in ranks):
        raise _Unfit(f"ranks is {_shown(ranks)}, must be a list of integers, 1 the best")
    elif len(ranks) != len(texts):
        raise _Unfit(f"ranks has {len(ranks)} entries, must have {len(texts)}, one for each response")
    return _comparison(_context("prompt", fields.get("prompt")), texts, origin, None, ranks=tuple(ranks))


def _conversation(fields: Mapping[str, Any], origin: Origin, _: FormOptions) -> Demonstration:
    prompt, completion = _split("messages", _messages("messages", fields.get("messages")))
    return Demonstration(prompt=prompt, completion=completion, origin=origin)


def _completion(fields: Mapping[str, Any], origin: Origin, _: FormOptions) -> Demonstration:
    name = _name_of(fields, ("completion", "response"))
    completion = _response(name, fields.get(name))
    return Demonstration(prompt=_context("prompt", fields.get("prompt")), completion=completion, origin=origin)


def _prompt(fields: Mapping[str, Any], origin: Origin, _: FormOptions) -> Prompt:
    name = _name_of(fields, ("prompt", "input_text"))
    return Prompt(prompt=_context(name, fields.get(name)), origin=origin)


_PARSERS: Final[dict[Form, Callable[[Mapping[str, Any], Origin, FormOptions], Record]]] = {
    "transcript": _transcript,
    "preference": _preference,
    "candidates": _candidates,
    "ranked": _ranked,
    "messages": _conversation,
    "completion": _completion,
    "prompt": _prompt,
}


def _compare_conversations(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...], origin: Origin, *, margin: float | None
) -> Comparison:
    prompt, better = _split("chosen", chosen)
    other_prompt, worse = _split("rejected", rejected)
    if prompt != other_prompt:
        raise _Unfit("chosen and rejected differ before the last assistant turn, must share the whole prompt")
    return _comparison(prompt, [better, worse], origin, margin)


def _comparison(
    prompt: Context, responses: list[str], origin: Origin, margin: float | None, ranks: tuple[int, ...] = (1, 2)
) -> Comparison:
    return Comparison(prompt=prompt, responses=tuple(responses), ranks=ranks, margin=margin, origin=origin)


def _split(field: str, conversation: tuple[Message, ...]) -> tuple[tuple[Message, ...], str]:
    last = conversation[-1]
    if last.role != "assistant":
        raise _Unfit(f"{field} ends with a turn of role {last.role!r}, must end with 'assistant'")
    if len(conversation) < 2:
        raise _Unfit(f"{field} has no turn before the assistant's: the prompt is empty")
    if not last.content.strip():
        raise _Unfit(f"{field} ends with an empty assistant turn")
    return conversation[:-1], last.content


def _context(field: str, value: Any) -> Context:
    if isinstance(value, str):
        if not value.strip():
            raise _Unfit(f"{field} is empty")
        return value
    return _messages(field, value, allowed="text or a list of messages")


def _as_messages(context: Context) -> tuple[Message, ...]:
    return (Message(role="user", content=context),) if isinstance(context, str) else context


def _messages(field: str, value: Any, *, allowed: str = "a list of messages") -> tuple[Message, ...]:
    _require(field, value)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise _Unfit(f"{field} is {_shown(value)}, must be {allowed} with role and content")
    return tuple(_message(f"{field}[{number}]", item) for number, item in enumerate(value))


def _message(field: str, value: Any) -> Message:
    if not isinstance(value, Mapping):
        raise _Unfit(f"{field} is {_shown(value)}, must have role and content")
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise _Unfit(f"{field}.role is {_shown(role)}, must be one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise _Unfit(f"{field}.content is {_shown(content)}, must be text")
    return Message(role=cast(Role, role), content=content)


def _response(field: str, value: Any) -> str:
    """A response as text, or as messages of which the last is the assistant's."""
    if isinstance(value, str):
        if not value.strip():
            raise _Unfit(f"{field} is empty")
        return value
    last = _messages(field, value, allowed="text or a list of messages")[-1]
    if last.role != "assistant":
        raise _Unfit(f"{field} ends with a turn of role {last.role!r}, must end with 'assistant'")
    if not last.content.strip():
        raise _Unfit(f"{field} is empty")
    return last.content


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    _require(name, value)
    if not isinstance(value, str):
        raise _Unfit(f"{name} is {_shown(value)}, must be text")
    if not value.strip():
        raise _Unfit(f"{name} is empty")
    return value


def _margin(fields: Mapping[str, Any]) -> float | None:
    margin = fields.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < float("inf"):
        raise _Unfit(f"margin is {_shown(margin)}, must be a number of at least 0")
    return float(margin)


def _label(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int) or len(str(value)) > _MAX_LABEL_CHARS:
        raise _Unfit(f"{name} is {_shown(value)}, must be a number or text of at most {_MAX_LABEL_CHARS} characters")
    return str(value)


def _require(field: str, value: Any) -> None:
    if value is None:
        raise _Unfit(f"{field} is missing")


def _name_of(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    """Which of several names for the same thing a row has; all of them if it has none."""
    return next((name for name in names if fields.get(name) is not None), " or ".join(names))


def _first(fields: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
