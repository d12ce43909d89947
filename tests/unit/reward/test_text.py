"""Text and chat to tokens, with a tokenizer of single characters whose ids can be read."""

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from steersman.reward.plugin import ChatTurn
from steersman.reward.text import Encoded, TextEncoder, shorten, transcript
from steersman.reward.types import ChatContent, TextContent

BOS, EOS = "<s>", "</s>"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "[{{ m.role[0] }}]{{ m.content }};{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


def tokenizer(*, chat_template: str | None = None, with_bos: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["<unk>", BOS, EOS, *map(chr, range(32, 127)), "\n"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.add_special_tokens([BOS, EOS])
    if with_bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, unk_token="<unk>", chat_template=chat_template
    )


def shown(made: PreTrainedTokenizerFast, encoded: Encoded | ValueError) -> tuple[str, str]:
    """Prompt and response as the tokens read."""
    assert isinstance(encoded, Encoded)
    assert encoded.token_ids.dtype == np.int32
    tokens = made.convert_ids_to_tokens(encoded.token_ids.tolist())
    return "".join(tokens[: encoded.num_prompt_tokens]), "".join(tokens[encoded.num_prompt_tokens :])


def chat(*turns: tuple[str, str], reply: str = "yes") -> ChatContent:
    messages = tuple(ChatTurn(role=role, content=content) for role, content in turns)
    return ChatContent(messages=messages, response=ChatTurn(role="assistant", content=reply))


def test_template_joins_text_and_adds_special_tokens():
    made = tokenizer(with_bos=True)
    (encoded,) = TextEncoder(made, "template").encode([TextContent(prompt="ab", response="cd")])
    assert shown(made, encoded) == ("<s>ab", "cd")


def test_template_renders_the_whole_conversation():
    made = tokenizer(chat_template=TEMPLATE, with_bos=True)
    (encoded,) = TextEncoder(made, "template").encode([chat(("user", "hi"))])
    prompt, response = shown(made, encoded)
    assert prompt + response == "[u]hi;[a]yes;"


def test_continuation_appends_the_response_and_eos():
    made = tokenizer(chat_template=TEMPLATE, with_bos=True)
    encoder = TextEncoder(made, "continuation")
    text, conversation = encoder.encode([TextContent(prompt="ab", response="cd"), chat(("user", "hi"))])
    assert shown(made, text) == ("<s>ab", "cd</s>")
    assert shown(made, conversation) == ("[u]hi;[a]", "yes</s>")


@pytest.mark.parametrize(("encoding", "end"), [("template", ""), ("continuation", "</s>")])
def test_without_a_chat_template_a_conversation_is_a_transcript(encoding, end):
    made = tokenizer()
    (encoded,) = TextEncoder(made, encoding).encode([chat(("system", "Be."), ("user", "hi"))])
    prompt, response = shown(made, encoded)
    assert prompt + response == "Be.\n\nHuman: hi\n\nAssistant: yes" + end


def test_a_refused_conversation_is_an_error_of_its_own():
    made = tokenizer(chat_template=TEMPLATE)
    good, bad, text = TextEncoder(made, "template").encode(
        [chat(("user", "hi")), chat(("robot", "beep")), TextContent(prompt="a", response="b")]
    )
    assert isinstance(good, Encoded)
    assert isinstance(bad, ValueError)
    assert "no robots" in str(bad)
    assert shown(made, text) == ("a", "b")


def test_an_unknown_role_of_a_transcript_is_named():
    with pytest.raises(ValueError, match="role is 'robot', allowed: system, user, assistant, tool"):
        transcript([ChatTurn(role="robot", content="beep")])


def test_continuation_needs_eos():
    made = tokenizer()
    made.eos_token = None
    with pytest.raises(ValueError, match="encoding: is 'continuation'"):
        TextEncoder(made, "continuation")


def test_decode_leaves_special_tokens_out():
    made = tokenizer()
    ids = np.array([made.bos_token_id, made.convert_tokens_to_ids("h"), made.eos_token_id], np.int32)
    assert TextEncoder(made, "template").decode(ids) == "h"


@pytest.mark.parametrize(
    ("ids", "num_prompt", "limit", "expected"),
    [
        ([1, 5, 6, 7, 8], 3, 5, [1, 5, 6, 7, 8]),
        ([1, 5, 6, 7, 8], 3, 4, [1, 6, 7, 8]),
        ([1, 5, 6, 7, 8], 3, 3, [1, 7, 8]),
        ([1, 5, 6, 7, 8], 3, 2, None),
        ([4, 5, 6, 7, 8], 3, 2, [7, 8]),
        ([4, 5, 6, 7, 8], 3, 1, None),
        ([1, 7, 8], 0, 2, None),
    ],
)
def test_shorten_drops_the_oldest_prompt_tokens_but_bos(ids, num_prompt, limit, expected):
    encoded = Encoded(token_ids=np.array(ids, np.int32), num_prompt_tokens=num_prompt)
    shorter = shorten(encoded, limit, bos_token_id=1)
    assert (shorter.token_ids.tolist() if shorter is not None else None) == expected
