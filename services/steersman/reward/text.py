"""Text and chat to token ids, in one of two ways.

template: what reward models of the hub are made for. A conversation with its response goes through the tokenizer's
chat template as a whole; prompt and response as text are joined and tokenized together, with the special tokens
that the tokenizer adds.

continuation: what Steersman's own `reward_model` stage trains on. The prompt is rendered up to where the response
begins, the response is tokenized by itself and appended, and EOS ends it: the tokens are those that a policy with
the same tokenizer would have sampled.

A tokenizer without a chat template falls back to the transcript form in both ways: "\\n\\nHuman: ...",
"\\n\\nAssistant: ...", a system turn as it stands.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from steersman.reward.plugin import ChatTurn
from steersman.reward.types import ChatContent, TextContent

Encoding: TypeAlias = Literal["template", "continuation"]

_TRANSCRIPT_MARKS: Final = {
    "system": "",
    "user": "\n\nHuman: ",
    "assistant": "\n\nAssistant: ",
    "tool": "\n\nTool: ",
}
_TRANSCRIPT_REPLY: Final = "\n\nAssistant:"


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Token ids of prompt and response, and how many of the first belong to the prompt (special ones included)."""

    token_ids: NDArray[np.int32]
    num_prompt_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rendered:
    """Text before tokenization. `response` is empty where the prompt holds everything."""

    prompt: str
    response: str
    add_special: bool
    response_alone: str


class TextEncoder:
    """Encodes with one tokenizer. Not thread-safe: tokenizers are not."""

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        """`tokenizer` is a `PreTrainedTokenizerBase`. `ValueError` if it has no EOS and the encoding needs one."""
        self._tokenizer = tokenizer
        self._encoding = encoding
        if encoding == "continuation" and tokenizer.eos_token_id is None:
            raise ValueError("encoding: is 'continuation', allowed for a tokenizer without EOS: template")
        bos = tokenizer.bos_token_id
        self._bos_ids = [bos] if bos is not None and self._tokenize([""], add_special=True)[0][:1] == [bos] else []

    def encode(self, contents: Sequence[TextContent | ChatContent]) -> list[Encoded | ValueError]:
        """Token ids of each item; an error for a conversation that the chat template refuses."""
        rendered: list[_Rendered | ValueError] = [self._render_or_error(content) for content in contents]
        good = [item for item in rendered if isinstance(item, _Rendered)]
        encoded = iter(self._encode_joined(good) if self._encoding == "template" else self._encode_apart(good))
        return [next(encoded) if isinstance(item, _Rendered) else item for item in rendered]

    def decode(self, token_ids: NDArray[np.int32]) -> str:
        """Text of token ids, without special tokens."""
        return str(self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself, special ones left out."""
        return [len(ids) for ids in self._tokenize(list(texts))]

    def _encode_joined(self, items: Sequence[_Rendered]) -> list[Encoded]:
        result: list[Encoded | None] = [None] * len(items)
        for add_special in (False, True):
            chosen = [index for index, item in enumerate(items) if item.add_special is add_special]
            texts = [items[index].prompt + items[index].response for index in chosen]
            # Where the response begins is only known to within a token: it may have merged with the prompt.
            responses = self._tokenize([items[index].response_alone for index in chosen])
            for index, ids, response in zip(chosen, self._tokenize(texts, add_special), responses, strict=True):
                result[index] = Encoded(
                    token_ids=np.array(ids, np.int32), num_prompt_tokens=max(0, len(ids) - len(response))
                )
        return [item for item in result if item is not None]

    def _encode_apart(self, items: Sequence[_Rendered]) -> list[Encoded]:
        prompts = self._tokenize([item.prompt for item in items])
        responses = self._tokenize([item.response for item in items])
        result = []
        for item, prompt, response in zip(items, prompts, responses, strict=True):
            start = self._bos_ids + prompt if item.add_special else prompt
            ids = [*start, *response, self._tokenizer.eos_token_id]
            result.append(Encoded(token_ids=np.array(ids, np.int32), num_prompt_tokens=len(start)))
        return result

    def _render_or_error(self, content: TextContent | ChatContent) -> _Rendered | ValueError:
        try:
            return self._render(content)
        except Exception as error:
            # Templates raise what they like; a refused conversation concerns its own item only.
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            return ValueError(f"the chat template refuses it: {first_line}")

    def _render(self, content: TextContent | ChatContent) -> _Rendered:
        if isinstance(content, TextContent):
            return _Rendered(
                prompt=content.prompt, response=content.response, add_special=True, response_alone=content.response
            )
        response = content.response.content
        if self._tokenizer.chat_template is None:
            return _Rendered(
                prompt=transcript(content.messages), response=" " + response, add_special=True, response_alone=response
            )
        if self._encoding == "continuation":
            prompt = self._apply_template(content.messages, add_generation_prompt=True)
            return _Rendered(prompt=prompt, response=response, add_special=False, response_alone=response)
        whole = self._apply_template([*content.messages, content.response], add_generation_prompt=False)
        return _Rendered(prompt=whole, response="", add_special=False, response_alone=response)

    def _apply_template(self, turns: Sequence[ChatTurn], *, add_generation_prompt: bool) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        return str(
            self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    def _tokenize(self, texts: list[str], add_special: bool = False) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(texts, add_special_tokens=add_special, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])


def transcript(messages: Sequence[ChatTurn]) -> str:
    """A conversation as text, up to where the reply begins. `ValueError` for an unknown role."""
    for turn in messages:
        if turn.role not in _TRANSCRIPT_MARKS:
            raise ValueError(f"role is {turn.role!r}, allowed: {', '.join(_TRANSCRIPT_MARKS)}")
    return "".join(_TRANSCRIPT_MARKS[turn.role] + turn.content for turn in messages) + _TRANSCRIPT_REPLY


def shorten(encoded: Encoded, max_tokens: int, bos_token_id: int | None) -> Encoded | None:
    """Drops the oldest prompt tokens (a BOS stays) to fit; None if the response alone does not fit."""
    excess = len(encoded.token_ids) - max_tokens
    if excess <= 0:
        return encoded
    ids = encoded.token_ids
    kept = 1 if encoded.num_prompt_tokens and bos_token_id is not None and ids[0] == bos_token_id else 0
    if excess > encoded.num_prompt_tokens - kept:
        return None
    return Encoded(
        token_ids=np.concatenate([ids[:kept], ids[kept + excess :]]),
        num_prompt_tokens=encoded.num_prompt_tokens - excess,
    )
