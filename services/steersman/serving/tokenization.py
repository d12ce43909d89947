"""The tokenizer that a checkpoint means, where transformers would read another one.

For some architectures (qwen2 is one) `AutoTokenizer` forces a class of its own on the files, which then splits text
otherwise without a word, or into nothing. `tokenizer.json` says completely how text becomes tokens, so it decides.
"""

import json
import logging
from pathlib import Path
from typing import Any, Final

_LOG = logging.getLogger(__name__)
_NUM_PROBED: Final = 200
_PROBE: Final = " The end, 1 2 3.\n\nx"


def trusted(tokenizer: Any, folder: Path) -> Any:
    """`tokenizer`, unless it splits a probe of its first tokens otherwise than the `tokenizer.json` in `folder`: then
    one that is made of that file, chat template and special tokens included.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return tokenizer
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    stated = Tokenizer.from_file(str(path))
    # The file may keep how its last user cut and padded; every call says that anew.
    stated.no_truncation()
    stated.no_padding()
    probe = stated.decode(list(range(min(stated.get_vocab_size(), _NUM_PROBED)))) + _PROBE
    if tokenizer.encode(probe, add_special_tokens=False) == stated.encode(probe, add_special_tokens=False).ids:
        return tokenizer
    _LOG.warning("%s is read instead of a %s, which splits text otherwise", path, type(tokenizer).__name__)
    own = PreTrainedTokenizerFast(tokenizer_object=stated, **_special_tokens(folder))
    own.chat_template = getattr(tokenizer, "chat_template", None)
    return own


def _special_tokens(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        if content := value.get("content") if isinstance(value, dict) else value:
            tokens[name] = content
    return tokens
