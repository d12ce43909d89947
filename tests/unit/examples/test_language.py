"""The language: every word has a token, held-out questions stay out, answers are as mixed as they should be."""

import random
from collections import Counter

from examples.demo import annotator, language


def test_every_text_is_made_of_the_vocabulary() -> None:
    words = set(language.vocabulary())
    questions, _ = language.split_questions(held_out=10, seed=0)
    for row in language.demonstrations(questions, num=2000, seed=1):
        assert words.issuperset(row["prompt"].split()), row
        assert words.issuperset(row["completion"].split()), row
    assert 100 <= len(words) <= 300


def test_held_out_questions_are_never_asked_in_training() -> None:
    train, held_out = language.split_questions(held_out=256, seed=3)
    assert len(held_out) == 256
    assert not {question.prompt for question in train} & {question.prompt for question in held_out}
    assert len(train) + len(held_out) == len(language.all_questions())
    asked = {row["prompt"] for row in language.demonstrations(train, num=3000, seed=3)}
    assert asked <= {question.prompt for question in train}


def test_the_same_seed_gives_the_same_language() -> None:
    questions, _ = language.split_questions(held_out=10, seed=5)
    first = list(language.demonstrations(questions, num=20, seed=5))
    assert first == list(language.demonstrations(questions, num=20, seed=5))
    assert first != list(language.demonstrations(questions, num=20, seed=6))


def test_answers_are_mixed() -> None:
    rng = random.Random(0)
    question = language.all_questions()[0]
    answers = [language.answer(question, rng) for _ in range(2000)]
    share = Counter[str]()
    for answer in answers:
        share["kind"] += any(phrase in answer for phrase in annotator.KIND)
        share["rude"] += any(phrase in answer for phrase in annotator.RUDE)
        share["to the point"] += annotator.names_the_thing(question.prompt, answer)
    for what, count in share.items():
        assert 0.2 < count / len(answers) < 0.8, what
    assert len(set(answers)) > 1500
