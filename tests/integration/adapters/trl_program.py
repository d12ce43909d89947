"""Trains a tiny model with TRL's GRPOTrainer whose only reward function asks a reward service: ADDRESS FOLDER."""

import json
import sys
from pathlib import Path

# TRL looks for a vLLM of its own age and does not load beside another; here it generates by itself.
sys.modules["vllm"] = None  # type: ignore[assignment]

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from steersman.adapters.trl import SteersmanReward

WORDS = ["<unk>", "</s>", "<pad>", *(f"w{n}" for n in range(13))]


def main(address: str, folder: Path) -> None:
    torch.manual_seed(0)
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            eos_token_id=1,
            pad_token_id=2,
        )
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[SteersmanReward(address, scorer="w3", columns=["answer"])],
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": f"w{n} w{n + 1}", "answer": f"w{n}"} for n in range(8)]),
        args=GRPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=6,
            max_steps=25,
            learning_rate=0.02,
            lr_scheduler_type="constant",
            beta=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            seed=0,
        ),
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "rewards/w3/mean" in row]
    (folder / "history.json").write_text(json.dumps([row["rewards/w3/mean"] for row in rows]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
