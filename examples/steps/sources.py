"""From a source to files that jobs read: tokenizer, demonstrations, prompts, and held-out prompts."""

import gzip
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from examples.demo import annotator, language
from examples.steps import tokenizer_files
from examples.steps.config import ComparisonSource, LanguageSource, PipelineConfig

# The hidden score of an answer: prompt, answer, whether it ended.
Gold = Callable[[str, str, bool], float]

_LAST_TURN: Final = "\n\nAssistant:"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a source gives.

    Attributes:
        tokenizer: folder.
        demonstrations: file for the sft job.
        prompts: file for the ppo job.
        train_prompts: texts that pairs may be sampled for.
        held_out_prompts: texts that no training sees.
        comparisons: training and held-out file, if people have compared already.
        gold: the hidden score, if there is one.
    """

    tokenizer: Path
    demonstrations: Path
    prompts: Path
    train_prompts: Sequence[str]
    held_out_prompts: Sequence[str]
    comparisons: tuple[Path, Path] | None = None
    gold: Gold | None = None


def prepare(config: PipelineConfig, directory: Path) -> Prepared:
    """Writes the files of the configured source below `directory`. ValueError for data that cannot be used."""
    directory.mkdir(parents=True)
    match config.source:
        case LanguageSource() as source:
            return _prepare_language(source, directory, seed=config.seed)
        case source:
            return _prepare_comparisons(source, directory, seed=config.seed)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes JSONL; gives the path back."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def _prepare_language(source: LanguageSource, directory: Path, *, seed: int) -> Prepared:
    train, held_out = language.split_questions(held_out=source.held_out_questions, seed=seed)
    tokenizer = directory / "tokenizer"
    tokenizer_files.save_word_level(tokenizer, language.vocabulary())
    rows = language.demonstrations(train, num=source.num_demonstrations, seed=seed)
    return Prepared(
        tokenizer=tokenizer,
        demonstrations=write_rows(directory / "demonstrations.jsonl", rows),
        prompts=write_rows(directory / "prompts.jsonl", ({"prompt": question.prompt} for question in train)),
        train_prompts=[question.prompt for question in train],
        held_out_prompts=[question.prompt for question in held_out],
        gold=lambda prompt, answer, ended: annotator.gold(prompt, answer, ended=ended),
    )


def _prepare_comparisons(source: ComparisonSource, directory: Path, *, seed: int) -> Prepared:
    if source.path is None:
        raise ValueError("source.path is missing: give the comparisons with --data FILE")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in _read_comparisons(source.path):
        groups.setdefault(prompt_of(row["chosen"]), []).append(row)
    prompts = sorted(groups)
    random.Random(f"{seed}/prompts").shuffle(prompts)
    num_held_out = max(1, round(len(prompts) * source.held_out_share))
    held_out, train = prompts[:num_held_out], prompts[num_held_out:]
    train_rows = [row for prompt in train for row in groups[prompt]]
    train_file = write_rows(directory / "comparisons.train.jsonl", train_rows)
    held_out_rows = (row for prompt in held_out for row in groups[prompt])
    held_out_file = write_rows(directory / "comparisons.held-out.jsonl", held_out_rows)
    tokenizer = directory / "tokenizer"
    texts = (row[side] for row in train_rows for side in ("chosen", "rejected"))
    tokenizer_files.save_byte_level(tokenizer, texts, vocab_size=source.vocab_size)
    return Prepared(
        tokenizer=tokenizer,
        demonstrations=train_file,
        prompts=train_file,
        train_prompts=train,
        held_out_prompts=held_out,
        comparisons=(train_file, held_out_file),
    )


def prompt_of(transcript: str) -> str:
    """A transcript up to where its last answer begins."""
    head, marker, _ = transcript.rpartition(_LAST_TURN)
    if not marker:
        raise ValueError(f"no turn of the assistant in {transcript[:60]!r}")
    return head + marker


def _read_comparisons(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    rows = []
    # Not splitlines: transcripts hold line separators of their own.
    for number, line in enumerate(text.rstrip("\n").split("\n"), start=1):
        row = json.loads(line)
        if not {"chosen", "rejected"} <= row.keys():
            raise ValueError(f"{path}:{number}: has no chosen and rejected")
        rows.append({"chosen": row["chosen"], "rejected": row["rejected"]})
    return rows
