import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from steersman.trainer.data.encode import Encoder
from steersman.trainer.data.records import Comparison, Demonstration, Message, Origin
from steersman.trainer.data.settings import TranscriptTemplate

WHERE = Origin(file="d.jsonl", line=1)
EOS, BOS = 257, 258


def byte_tokenizer(*, bos: bool = False, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token for each byte, so that every expectation can be written as text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({symbol: n for n, symbol in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "<eos>", "<bos>"])
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>" if bos else None,
        chat_template=chat_template,
    )


def encoder(tokenizer=None, *, prompt=100, response=100) -> Encoder:
    return Encoder(tokenizer=tokenizer or byte_tokenizer(), max_prompt_tokens=prompt, max_response_tokens=response)


def text(enc: Encoder, ids: list[int]) -> str:
    return enc.tokenizer.decode(ids)


CHAT = (Message(role="system", content="Be kind."), Message(role="user", content="Hi"))


def test_text_is_taken_as_it_stands_and_a_response_ends_with_eos():
    enc = encoder()
    (example,) = enc.demonstrations([Demonstration(prompt="Q: 1+1=", completion="2", origin=WHERE)])
    assert text(enc, example.prompt_ids) == "Q: 1+1="
    assert text(enc, example.response_ids) == "2<eos>"
    assert example.num_tokens == 9


def test_messages_without_a_chat_template_become_a_transcript():
    enc = encoder()
    (example,) = enc.demonstrations([Demonstration(prompt=CHAT, completion="Hello", origin=WHERE)])
    assert text(enc, example.prompt_ids) == "Be kind.\n\nHuman: Hi\n\nAssistant:"
    assert text(enc, example.response_ids) == " Hello<eos>"
    other = Encoder(
        tokenizer=enc.tokenizer,
        max_prompt_tokens=99,
        max_response_tokens=9,
        transcript=TranscriptTemplate(user="\nU: ", prompt_end="\nA: ", response_start=""),
    )
    assert text(other, other.prompts([CHAT])[0]) == "Be kind.\nU: Hi\nA: "
    assert text(other, other.responses(["ok"], contexts=[CHAT])[0]) == "ok<eos>"


def test_a_chat_template_is_used_where_there_is_one():
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    enc = encoder(byte_tokenizer(bos=True, chat_template=template))
    assert text(enc, enc.prompts([CHAT])[0]) == "[system]Be kind.[user]Hi[assistant]"
    assert text(enc, enc.responses(["ok"], contexts=[CHAT])[0]) == "ok<eos>"


def test_bos_stands_before_plain_text_where_the_tokenizer_puts_it_and_survives_truncation():
    enc = encoder(byte_tokenizer(bos=True), prompt=4)
    assert text(enc, enc.prompts(["ab"])[0]) == "<bos>ab"
    assert text(enc, enc.prompts(["abcdef"])[0]) == "<bos>def"
    assert text(enc, enc.responses(["ab"], contexts=["x"])[0]) == "ab<eos>"


def test_truncation_takes_the_oldest_of_a_prompt_and_the_end_of_a_response():
    enc = encoder(prompt=3, response=4)
    assert text(enc, enc.prompts(["abcdef"])[0]) == "def"
    assert [text(enc, ids) for ids in enc.responses(["xyz", "wxyz"], contexts=["", ""])] == ["xyz<eos>", "wxyz"]


def test_responses_of_a_comparison_share_their_prompt():
    enc = encoder()
    records = [
        Comparison(prompt="P", responses=("a", "b", "c"), ranks=(1, 2, 3), origin=WHERE),
        Comparison(prompt=CHAT, responses=("d", "e"), ranks=(2, 1), origin=WHERE),
    ]
    encoded = enc.comparisons(records)
    assert [[text(enc, e.response_ids) for e in group] for group in encoded] == [
        ["a<eos>", "b<eos>", "c<eos>"],
        [" d<eos>", " e<eos>"],
    ]
    assert all(example.prompt_ids == group[0].prompt_ids for group in encoded for example in group)


def test_special_tokens_in_the_text_of_a_bound_are_checked():
    with pytest.raises(ValueError, match="max_prompt_tokens is 0"):
        encoder(prompt=0)
    with pytest.raises(ValueError, match="prompt 0 has no token"):
        encoder().prompts([""])
    assert encoder().prompts([]) == []
