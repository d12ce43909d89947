"""The simulated annotator, and the rule by which it judges.

The rule is hidden: only `compare` (which the pipeline calls to label pairs) and the evaluation read it. Training sees
its *choices* alone, and those are noisy: of two answers it prefers the first with the Bradley-Terry probability
sigmoid((gold(first) - gold(second)) / temperature).

    gold = 2 if the thing that was asked about is named with its colour
         + 1 for each of at most two kind phrases     - 1.5 for each rude one
         - 1 for each sentence said twice             - 0.15 for each word beyond 20 or short of 8
         - 2 for an answer that does not end
"""

import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import Final

from examples.demo import language

KIND: Final = (*language.KIND_OPENERS, *language.KIND_CLOSERS)
RUDE: Final = (*language.RUDE_OPENERS, *language.RUDE_CLOSERS)
SHORTEST_WORDS: Final = 8
LONGEST_WORDS: Final = 20


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A noisy comparison of two answers."""

    first_is_better: bool
    probability: float


def gold(prompt: str, answer: str, *, ended: bool = True) -> float:
    """The hidden score of an answer; about -4 to 4."""
    score = 2.0 if names_the_thing(prompt, answer) else 0.0
    score += min(2, sum(phrase in answer for phrase in KIND))
    score -= 1.5 * sum(answer.count(phrase) for phrase in RUDE)
    sentences = Counter(_sentences(answer))
    score -= sum(count - 1 for count in sentences.values())
    num_words = len(answer.split())
    score -= 0.15 * (max(0, num_words - LONGEST_WORDS) + max(0, SHORTEST_WORDS - num_words))
    return score if ended else score - 2.0


def compare(
    prompt: str, first: tuple[str, bool], second: tuple[str, bool], *, temperature: float, rng: random.Random
) -> Judgement:
    """Compares two answers (text, whether it ended); ties are decided by a coin."""
    difference = gold(prompt, first[0], ended=first[1]) - gold(prompt, second[0], ended=second[1])
    probability = 1.0 / (1.0 + math.exp(-difference / temperature))
    return Judgement(first_is_better=rng.random() < probability, probability=probability)


def names_the_thing(prompt: str, answer: str) -> bool:
    """Whether the answer names what was asked about, with its colour."""
    words = prompt.split()
    asked = next((index for index, word in enumerate(words) if word in language.THINGS), None)
    return asked is not None and f" {words[asked - 1]} {words[asked]} " in f" {answer} "


def _sentences(answer: str) -> list[str]:
    sentences, words = [], list[str]()
    for word in answer.split():
        words.append(word)
        if word in (".", "!", "?"):
            sentences.append(" ".join(words))
            words = []
    return sentences
