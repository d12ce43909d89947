"""Records to token ids, the same way for every stage, so that what one stage trains on is what the next one sees.

A prompt of messages goes through the tokenizer's chat template, or through :class:`TranscriptTemplate` if it has none;
a prompt of plain text is taken as it stands. A response is tokenized by itself and appended: its first token never
merges with the prompt's last, just as the policy samples it. A complete response ends with EOS.

Truncation: a prompt that is too long loses its *oldest* tokens (BOS stays); a response that is too long loses its
*last* tokens, EOS with them, because a response that was cut off did not end there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from steersman.trainer.data.records import Comparison, Context, Demonstration
from steersman.trainer.data.settings import TranscriptTemplate


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sequence: prompt tokens, then response tokens (EOS among them, if the response was not cut off)."""

    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens of both together."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Tokenizes records. ``max_prompt_tokens`` and ``max_response_tokens`` (EOS counted) bound every sequence."""

    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int
    max_response_tokens: int
    transcript: TranscriptTemplate = field(default_factory=TranscriptTemplate)

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_response_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token: responses could not end")

    def prompts(self, contexts: Sequence[Context]) -> list[list[int]]:
        """Token ids of prompts, in order. ValueError names the place of a prompt that has no token."""
        rendered = [self._render(context) for context in contexts]
        bos = self.tokenizer.bos_token_id
        # A chat template writes BOS itself; before plain text it stands only if this tokenizer's way is to put it
        # there.
        with_bos = bos is not None and self._tokenize([""], special=True)[0][:1] == [bos]
        result = []
        for number, (ids, (_, templated)) in enumerate(
            zip(self._tokenize([t for t, _ in rendered]), rendered, strict=True)
        ):
            if not ids:
                raise ValueError(f"prompt {number} has no token")
            if with_bos and not templated:
                ids = [bos, *ids]
            if len(ids) > self.max_prompt_tokens:
                head = [bos] if ids[0] == bos and self.max_prompt_tokens > 1 else []
                ids = head + ids[len(ids) - self.max_prompt_tokens + len(head) :]
            result.append(ids)
        return result

    def responses(self, texts: Sequence[str], *, contexts: Sequence[Context]) -> list[list[int]]:
        """Token ids of responses with EOS, each to follow the prompt of the same place in ``contexts``."""
        starts = [self._response_start(context) for context in contexts]
        tokenized = self._tokenize([start + text for start, text in zip(starts, texts, strict=True)])
        return [[*ids, self.tokenizer.eos_token_id][: self.max_response_tokens] for ids in tokenized]

    def demonstrations(self, records: Sequence[Demonstration]) -> list[Example]:
        """One example for each record."""
        contexts = [record.prompt for record in records]
        responses = self.responses([record.completion for record in records], contexts=contexts)
        return [
            Example(prompt_ids=prompt, response_ids=response)
            for prompt, response in zip(self.prompts(contexts), responses, strict=True)
        ]

    def comparisons(self, records: Sequence[Comparison]) -> list[list[Example]]:
        """For each record, one example for each of its responses, in their order."""
        contexts = [record.prompt for record in records]
        prompts = self.prompts(contexts)
        flat_texts = [response for record in records for response in record.responses]
        flat_contexts = [record.prompt for record in records for _ in record.responses]
        responses = iter(self.responses(flat_texts, contexts=flat_contexts))
        return [
            [Example(prompt_ids=prompt, response_ids=next(responses)) for _ in record.responses]
            for record, prompt in zip(records, prompts, strict=True)
        ]

    def _render(self, context: Context) -> tuple[str, bool]:
        if isinstance(context, str):
            return context, False
        if self.tokenizer.chat_template is None:
            return self.transcript.render(context), False
        turns = [{"role": message.role, "content": message.content} for message in context]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)), True

    def _response_start(self, context: Context) -> str:
        transcript = not isinstance(context, str) and self.tokenizer.chat_template is None
        return self.transcript.response_start if transcript else ""

    def _tokenize(self, texts: list[str], *, special: bool = False) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])
