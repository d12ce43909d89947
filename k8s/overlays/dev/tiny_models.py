"""Makes a policy and a reward model of random weights, and prompts, below a folder; waits if another process does.

All have one tokenizer of single letters. Nothing they say means anything: they show that the services work.
"""

import fcntl
import json
import string
import sys
from pathlib import Path

LETTERS = " " + string.ascii_lowercase + string.digits + ".,!?"
NUM_PROMPTS = 256


def main(folder: Path) -> None:
    """Makes what is missing. The list of prompts comes last: when it is there, everything is."""
    with (folder / ".tiny_models.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "prompts.jsonl").exists():
            print(f"{folder}: everything is there")
            return
        make(folder)


def make(folder: Path) -> None:
    """Makes all of it."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", "<unk>", *LETTERS])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        num_labels=1,
        tie_word_embeddings=False,
    )
    for name, kind, seed in (("policy", LlamaForCausalLM, 1), ("reward", LlamaForSequenceClassification, 2)):
        torch.manual_seed(seed)
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompts = [{"prompt": f"question {number}? "} for number in range(NUM_PROMPTS)]
    unfinished = folder / "prompts.jsonl.new"
    unfinished.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    unfinished.replace(folder / "prompts.jsonl")
    print(f"{folder}: made policy, reward and prompts.jsonl")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
