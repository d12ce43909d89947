"""Small tokenizers built on the spot, saved in the layout that `AutoTokenizer` reads."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

PAD: Final = "<pad>"
EOS: Final = "<eos>"
UNKNOWN: Final = "<unk>"


def save_word_level(directory: Path, words: Sequence[str]) -> int:
    """One token a word, words parted by spaces. Returns the size of the vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    vocabulary = {word: number for number, word in enumerate([PAD, EOS, UNKNOWN, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return _save(directory, tokenizer, unk_token=UNKNOWN)


def save_byte_level(directory: Path, texts: Iterable[str], *, vocab_size: int) -> int:
    """Byte-level BPE learnt from `texts`: any text round-trips. Returns the size of the vocabulary."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _save(directory, tokenizer)


def _save(directory: Path, tokenizer: object, *, unk_token: str | None = None) -> int:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=unk_token,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)
    return len(fast)
